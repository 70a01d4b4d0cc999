"""Other libraries' models with this loss; a module per library, imported by whoever needs it."""
