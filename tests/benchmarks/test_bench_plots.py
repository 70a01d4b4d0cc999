"""Pictures: texts are on them, large enough and free of others; what was measured is drawn."""

import dataclasses
import itertools

import pytest

plots = pytest.importorskip("benchmarks.plots", reason="matplotlib is not installed")

from matplotlib import rc_context  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from benchmarks import records, report  # noqa: E402
from benchmarks.memory import KIND  # noqa: E402
from benchmarks.records import Record  # noqa: E402

SIZES = (65, 6148, 32000, 50257, 128256, 151936, 256000)
MEASURED = [
    pytest.param(name, machine, id=f"{name}-{machine}")
    for machine in report.load(records.RESULTS) for name in plots.PLOTS
]  # fmt: skip


@pytest.fixture
def made(about):
    """Records that nobody measured, of a GPU with all peers: close lines, on all their sizes."""

    def record(provider, **changes):
        return Record(**{**about, "gpu": "NVIDIA H100 80GB HBM3"}, provider=provider, **changes)

    found = []
    for dtype, size in itertools.product(("bfloat16", "float32", "float16"), SIZES):
        case = {"case": "forward_backward", "dtype": dtype, "vocab_size": size}
        for n_rows, faster in ((8192, 1.0), (64, 1.5)):
            found += [
                record(provider, n_rows=n_rows, ms_median=ms / faster, **case)
                for provider, ms in
                (("fused_ce", 10.0 * faster), ("torch", 52.0), ("torch.compile", 12.0),
                 ("liger", 11.0), ("quack", 9.5))
            ]  # fmt: skip
    for n_rows, provider in itertools.product((4096, 8192, 16384), plots.MEMORY_PENS):
        copies = {"torch": 3, "fused_ce whole logits": 2, "fused_ce in place": 1,
                  "torch.compile": 1}.get(provider, 0.05)  # fmt: skip
        found.append(
            record(provider, case=KIND, n_rows=n_rows, hidden_size=4096, vocab_size=128256,
                   dtype="bfloat16", peak_bytes=int(10**9 + copies * 2 * n_rows * 128256))
        )  # fmt: skip
    return found


def drawn(name, of_machine):
    with rc_context(plots.STYLE):
        figure = plots.PLOTS[name](of_machine)
        figure.canvas.draw()
    return figure


def boxes(figure):
    """Where each text lies, in pixels; without the line from a name to its end."""
    unseen = set()
    for axis in figure.axes:
        low, high = sorted(axis.get_ylim())
        ticks = zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
        unseen |= {label for at, label in ticks if not low <= at <= high}
    renderer = figure.canvas.get_renderer()
    return {
        text: Text.get_window_extent(text, renderer)
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and text not in unseen
    }


def assert_legible(figure):
    whole = figure.bbox
    found = boxes(figure)
    for text, box in found.items():
        assert text.get_fontsize() >= 9, text
        cut = box.x0 < 0 or box.y0 < 0 or box.x1 > whole.x1 or box.y1 > whole.y1
        assert not cut, f"{text.get_text()!r} is cut off"
    for (one, first), (other, second) in itertools.combinations(found.items(), 2):
        assert not first.overlaps(second), f"{one.get_text()!r} lies on {other.get_text()!r}"
    for axis in figure.axes:
        for line in axis.lines:
            if line.get_marker() in ("None", ""):
                continue
            for x, y in axis.transData.transform(line.get_xydata()):
                on = [text.get_text() for text, box in found.items() if box.contains(x, y)]
                assert not on, f"a mark lies on {on}"


@pytest.mark.parametrize(("name", "machine"), MEASURED)
def test_no_text_of_the_results_is_cut_off_or_lies_on_another(name, machine):
    figure = drawn(name, report.load(records.RESULTS)[machine])
    assert figure.get_figwidth() == 4.5
    assert_legible(figure)


@pytest.mark.parametrize("name", plots.PLOTS)
def test_nor_where_all_peers_are_measured_and_lie_close(name, made):
    assert_legible(drawn(name, made))


def test_the_test_of_texts_sees_those_that_overlap(made):
    figure = drawn("memory", made)
    first, *_ = figure.axes[0].texts
    figure.axes[0].annotate("another name", first.xy, first.xyann, textcoords="figure points")
    with pytest.raises(AssertionError, match="lies on"):
        assert_legible(figure)
    figure = drawn("memory", made)
    figure.text(0.9, 0.5, "a long name at the edge")
    with pytest.raises(AssertionError, match="cut off"):
        assert_legible(figure)


def lines(axis):
    """Those that join measurements, by their colour."""
    return {line.get_color(): line for line in axis.lines if line.get_markersize() > 3
            and line.get_marker() not in ("None", "")}  # fmt: skip


def test_lines_are_the_largest_batch_and_marks_the_others(made):
    figure = drawn("speed-up", made)
    assert [axis.get_title("left").split(":")[0] for axis in figure.axes] == [
        "float32", "bfloat16", "float16",
    ]  # fmt: skip
    for axis in figure.axes:
        torch = lines(axis)[plots.SPEED_PENS["torch"].colour]
        assert list(torch.get_xdata()) == list(SIZES)
        assert torch.get_ydata() == pytest.approx([5.2] * len(SIZES))
        small = [line for line in axis.lines if line.get_markersize() == 3]
        found = {value for line in small for value in line.get_ydata()}
        assert min(found) == pytest.approx(9.5 / 1.5 / 10)


def test_what_is_slower_is_on_the_picture(made):
    """Down to the slowest, on the grey below the line at 1."""
    slow = [
        dataclasses.replace(r, ms_median=0.6) if r.provider == "quack" and r.n_rows == 64 else r
        for r in made
    ]
    for axis in drawn("speed-up", slow).axes:
        values = [y for line in axis.lines for y in line.get_ydata()]
        assert min(values) == pytest.approx(0.06) and axis.get_ylim()[0] < 0.06
        (at_one,) = [line for line in axis.lines if set(line.get_ydata()) == {1.0}]
        assert at_one.get_linestyle() == "-" and "ours is slower" in [
            text.get_text() for text in axis.texts
        ]


def test_ends_are_named_with_their_size(made):
    figure = drawn("memory", made)
    named = {text.get_text(): text for text in figure.axes[0].texts}
    assert set(named) >= {"eager PyTorch\n13.6 GB", "ours, whole logits\n9.4 GB"}
    assert len(named) == len(plots.MEMORY_PENS)
    heights = [text.get_window_extent().y0 for text in named.values()]
    assert heights == sorted(heights)  # in the order of their values


def test_small_peaks_are_in_mb(made):
    small = [dataclasses.replace(r, peak_bytes=r.peak_bytes and r.peak_bytes // 1000) for r in made]
    assert "eager PyTorch\n14 MB" in {t.get_text() for t in drawn("memory", small).axes[0].texts}


@pytest.mark.parametrize("pens", [plots.SPEED_PENS, plots.MEMORY_PENS], ids=["speed", "memory"])
def test_names_are_dark_enough_to_read(pens):
    """A contrast of 4.5 to white, as WCAG asks for text."""
    for pen in pens.values():
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                  for c in to_rgb(pen.colour)]  # fmt: skip
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 4.5, pen


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([20, 60], [20, 60]),
        ([50, 50], [50, 60]),
        ([0, 2, 4], [5, 15, 25]),
        ([98, 99, 99], [75, 85, 95]),
        ([20, 98, 99], [20, 85, 95]),
    ],
    ids=["apart", "together", "at the bottom", "at the top", "two of three"],
)
def test_names_are_spread(wanted, found):
    assert plots.spread(wanted, [10] * len(wanted), 0, 100) == found


def test_files_are_drawn_where_there_is_something(made, tmp_path):
    made = [r for r in made if r.dtype == "bfloat16" and r.provider in ("fused_ce", "torch")]
    few = [r for r in made if r.case != KIND]
    alone = [r for r in made if r.vocab_size == 65]
    paths = plots.draw({"all": made, "few": few, "alone": alone}, tmp_path)
    names = {"all-speed-up", "all-memory", "few-speed-up"}
    expected = {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert {path.name for path in paths} == expected == {p.name for p in tmp_path.iterdir()}


def test_the_same_records_make_the_same_file(made, tmp_path):
    """So that a commit changes a picture only where its numbers change."""
    made, kept = [r for r in made if r.case == KIND], []
    for _ in range(2):
        plots.draw({"a": made}, tmp_path)
        kept.append((tmp_path / "a-memory.svg").read_bytes())
    assert kept[0] == kept[1] and b"<text" not in kept[0]  # a phone has other fonts
