"""The errors that a user can repair; the command line prints them on one line."""


class UserError(Exception):
    """A mistake in a flag, a file or a prompt; the message says what is needed and what came."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or not one of ours."""
