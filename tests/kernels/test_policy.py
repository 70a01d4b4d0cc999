"""The launch policy: pure functions of sizes."""

import pytest

from fused_ce.kernels import policy
from fused_ce.kernels.policy import (
    MAX_SPLITS,
    SMALL_VOCAB,
    held_config,
    row_splits,
    small_config,
    split_config,
    stream_config,
    tangents_config,
    variants,
)

VOCABS = sorted({*range(1, 300), *range(300, 1_000_000, 4999), 1_000_000,
                 *(2**k + d for k in range(20) for d in (-1, 0, 1) if 2**k + d > 0)})  # fmt: skip
WARPS = [32, 64]


def is_power_of_two(n):
    return n > 0 and n & (n - 1) == 0


class TestPolicy:
    """Pure functions of sizes."""

    @pytest.mark.parametrize("warp_size", WARPS)
    @pytest.mark.parametrize("element_size", [2, 4, 8])
    def test_stream(self, warp_size, element_size):
        for vocab_size in VOCABS:
            config = stream_config(vocab_size, element_size, warp_size)
            assert is_power_of_two(config.block_v) and is_power_of_two(config.num_warps)
            threads = config.num_warps * warp_size
            assert 64 <= threads <= 1024
            # one 16-byte vector a thread and tile: no thread idle, none with two
            assert config.block_v * element_size == 16 * threads
            assert config.unroll >= 1 and config.held == 0
            assert config.block_v * config.unroll * element_size <= 64 * threads

    @pytest.mark.parametrize("warp_size", WARPS)
    @pytest.mark.parametrize("element_size", [2, 4, 8])
    def test_held(self, warp_size, element_size):
        for vocab_size in (v for v in VOCABS if v > SMALL_VOCAB):
            config = held_config(vocab_size, element_size, warp_size)
            threads = config.num_warps * warp_size
            assert is_power_of_two(threads) and 64 <= threads <= 1024
            assert config.block_v * element_size == 16 * threads
            assert 1 <= config.unroll <= config.held
            assert config.held * 16 // 4 * threads <= 65536 // 2  # half of the registers
            capacity = config.held * config.block_v
            # all of the row, in no more than twice the registers that it needs, or all there are
            if vocab_size <= capacity:
                assert capacity < 2 * vocab_size or (threads == 64 and config.held <= 4)
            else:
                assert threads == (256 if element_size == 8 else 1024)

    @pytest.mark.parametrize("element_size", [2, 4, 8])
    def test_splits(self, element_size):
        for vocab_size in VOCABS:
            for n_rows in (0, 1, 2, 3, 16, 63, 64, 65, 128, 129, 5000):
                splits = row_splits(n_rows, vocab_size, element_size)
                assert 1 <= splits <= MAX_SPLITS
                if splits > 1:
                    config = split_config(element_size)
                    step = config.block_v * config.unroll
                    columns = -(-vocab_size // (splits * step)) * step  # as launch_split cuts them
                    assert (splits - 1) * columns < vocab_size  # none is without columns
                    assert n_rows * splits <= 1024
        assert row_splits(4, 50_257, 2) == 13 and row_splits(4, 128_256, 2) == 32
        assert row_splits(1, 256_000, element_size) >= 62
        assert row_splits(64, 256_000, element_size) == 16
        assert row_splits(8192, 256_000, element_size) == 1

    @pytest.mark.parametrize("warp_size", WARPS)
    @pytest.mark.parametrize("element_size", [2, 4, 8])
    def test_variants_are_all_that_can_be_chosen(self, warp_size, element_size):
        named = {(v.kernel, v.config) for v in variants(element_size, warp_size)}
        chosen = set()
        for vocab_size in VOCABS:
            for n_rows in (1, 2, 64, 128, 129):
                chosen.update(policy._choices(n_rows, vocab_size, element_size, warp_size))
        assert named == chosen

    @pytest.mark.parametrize("element_size", [2, 4, 8])
    def test_longer_rows_never_get_fewer_threads(self, element_size):
        warps = [stream_config(v, element_size).num_warps for v in VOCABS]
        assert warps == sorted(warps)

    @pytest.mark.parametrize("warp_size", WARPS)
    def test_small(self, warp_size):
        for vocab_size in range(1, SMALL_VOCAB + 1):
            config = small_config(vocab_size, warp_size)
            assert vocab_size <= config.block_v < 2 * vocab_size or vocab_size == 1
            assert is_power_of_two(config.block_v) and is_power_of_two(config.block_rows)
            assert is_power_of_two(config.num_warps) and config.num_warps * warp_size <= 1024
            elements = config.block_rows * config.block_v
            assert 512 <= elements <= 1024
            assert elements / (config.num_warps * warp_size) <= 32  # registers

    def test_the_same_on_every_machine(self):
        """The interpreter must run what a GPU runs: no argument but sizes."""
        assert stream_config(50257, 2) == stream_config(50257, 2, 32)
        assert small_config(65) == small_config(65, 32)


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("heavy", [False, True])
def test_tangents(warp_size, element_size, heavy):
    for vocab_size in (1, 65, 512, 1025, 6148, 50257, 128256, 1_000_000):
        config = tangents_config(vocab_size, element_size, warp_size, heavy)
        threads = config.num_warps * warp_size
        assert 64 <= threads <= 1024 and threads & (threads - 1) == 0
        # one 16-byte vector a thread and tile; the edges, of two vectors, one element a thread
        assert config.block_v * element_size == 16 * threads >= 2 * 16 * 16 // element_size
