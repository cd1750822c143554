"""What all the notebooks draw with: one palette, one width, and the engine map.

Figures have a light, opaque background of their own, so that they read the same on a light page
and on a dark one.
"""

import io

import matplotlib.pyplot as plt
from IPython.display import Image, display
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image as Pixels

PAPER, INK, FAINT, GRID = "#fbfaf6", "#22303c", "#8a949c", "#dcd8cd"
BLUE, ORANGE, GREEN, RED = "#3b78b5", "#e08a2c", "#4a9a5f", "#c8504b"
PURPLE, TEAL, PINK, GOLD = "#8565b0", "#3a9c9c", "#cf6f9b", "#c9a227"
COLORS = [BLUE, ORANGE, GREEN, PURPLE, TEAL, PINK, GOLD, RED]  # sequences, in order
WIDTH = 8.4  # inches: every figure is as wide as every other


def use_style():
    """Set matplotlib to the course's look; call it once, at the top of a notebook."""
    plt.rcParams.update({
        "figure.figsize": (WIDTH, 3.0), "figure.dpi": 100, "savefig.dpi": 100,
        "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "axes.facecolor": PAPER,
        "figure.constrained_layout.use": True,
        "font.size": 9.5, "font.family": "DejaVu Sans", "text.color": INK,
        "axes.edgecolor": FAINT, "axes.labelcolor": INK, "axes.titlesize": 10.5,
        "axes.titlelocation": "left", "axes.titleweight": "bold",
        "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": False, "grid.color": GRID, "grid.linewidth": 0.8,
        "axes.prop_cycle": plt.cycler(color=COLORS), "lines.linewidth": 1.8,
        "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
        "legend.frameon": False, "legend.fontsize": 8.5, "image.cmap": "cividis",
    })


def canvas(height=3.0, xlim=(0, 10), ylim=(0, 10), title=None):
    """A figure of full width with one empty axes without ticks, for drawings made of boxes."""
    fig, ax = plt.subplots(figsize=(WIDTH, height))
    ax.set(xlim=xlim, ylim=ylim)
    ax.axis("off")
    if title:
        ax.set_title(title)
    return fig, ax


def tint(color, share=0.75):
    """`color` mixed with the paper: 0 leaves it, 1 is paper."""
    from matplotlib.colors import to_hex, to_rgb
    return to_hex([c + (p - c) * share for c, p in zip(to_rgb(color), to_rgb(PAPER))])


def box(ax, x, y, w, h, text="", color=BLUE, fill=None, size=9, bold=False, round=0.0, ink=None,
        dashed=False):
    """A box with centred text; its fill is a tint of its edge unless given."""
    fill = tint(color) if fill is None else fill
    style = dict(facecolor=fill, edgecolor=color, linewidth=1.2, linestyle="--" if dashed else "-")
    if round:
        ax.add_patch(FancyBboxPatch((x + round, y + round), w - 2 * round, h - 2 * round,
                                    boxstyle=f"round,pad={round}", **style))
    else:
        ax.add_patch(Rectangle((x, y), w, h, **style))
    if text != "":
        ax.text(x + w / 2, y + h / 2, str(text), ha="center", va="center", fontsize=size,
                color=ink or INK, fontweight="bold" if bold else "normal", linespacing=1.25)


def cells(ax, x, y, values, w=1.0, h=1.0, colors=BLUE, size=8.5, label=None, ink=None):
    """A row of boxes, one per value (None: an empty dashed one); `label` stands to its left."""
    for i, value in enumerate(values):
        color = colors[i] if isinstance(colors, (list, tuple)) else colors
        empty = value is None
        box(ax, x + i * w, y, w, h, "" if empty else value, FAINT if empty else color,
            fill=PAPER if empty else None, size=size, dashed=empty, ink=ink)
    if label is not None:
        ax.text(x - 0.15 * w, y + h / 2, label, ha="right", va="center", fontsize=size)


def arrow(ax, start, end, color=FAINT, bend=0.0, width=1.3, dashed=False, head=9):
    """An arrow from one point to another, bent if asked."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=head, color=color,
                                 linewidth=width, linestyle="--" if dashed else "-",
                                 connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0))


def note(ax, x, y, text, color=INK, size=8.5, ha="left", va="center", **kwargs):
    """A line of text at a point."""
    ax.text(x, y, text, color=color, fontsize=size, ha=ha, va=va, **kwargs)


# name, module, days (none: a room, which an appendix fills), x, y, width
ENGINE_MAP = [
    ("LLM", "llm.py", (5,), 0.0, 7.6, 2.1),
    ("LLMEngine", "engine/llm_engine.py", (5,), 2.5, 7.6, 2.9),
    ("Config · SamplingParams", "config.py, sampling_params.py", (1,), 5.8, 7.6, 4.2),
    ("ModelRunner", "engine/model_runner.py", (4, 6), 0.0, 5.1, 2.8),
    ("Scheduler", "engine/scheduler.py", (4,), 3.1, 5.1, 2.1),
    ("BlockManager", "engine/block_manager.py", (3,), 5.6, 5.1, 2.3),
    ("Sequence", "engine/sequence.py", (1,), 8.1, 5.1, 1.9),
    ("Context", "utils/context.py", (1,), 0.0, 2.6, 2.2),
    ("Qwen3 · Llama", "models/, layers/", (2,), 2.6, 2.6, 2.4),
    ("Sampler · Detokenizer", "layers/sampler.py, engine/text.py", (5,), 5.6, 2.6, 4.4),
    ("Attention · KV cache", "layers/attention.py", (2, 3), 0.0, 0.1, 3.0),
    ("parallel layers", "layers/linear.py", (6,), 3.4, 0.1, 2.0),
    ("rooms", "cpu/, gpu/", (), 5.8, 0.1, 2.6),
    ("bench.py", "", (7,), 8.8, 0.1, 1.2),
]
MAP_ARROWS = [
    ((2.1, 8.4), (2.5, 8.4)), ((5.4, 8.4), (5.8, 8.4)), ((3.1, 7.6), (2.0, 6.7)),
    ((4.1, 7.6), (4.1, 6.7)), ((5.35, 7.6), (5.65, 4.2)), ((5.2, 5.9), (5.6, 5.9)),
    ((7.9, 5.9), (8.1, 5.9)), ((1.1, 5.1), (1.1, 4.2)), ((2.3, 5.1), (3.1, 4.2)),
    ((3.2, 2.6), (2.4, 1.7)), ((4.2, 2.6), (4.4, 1.7)), ((1.1, 1.7), (1.1, 2.6)),
]


def png(fig):
    """A figure as a PNG of at most 64 colours, a third of the bytes; the figure is closed."""
    drawn, small = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png")
    plt.close(fig)
    with Pixels.open(drawn) as pixels:
        pixels.convert("RGB").quantize(64, dither=Pixels.Dither.NONE).save(small, "PNG",
                                                                         optimize=True)
    return small.getvalue()


def show(alt, fig=None):
    """Show the figure that was drawn last; `alt` says what it shows, for those who cannot see."""
    display(Image(png(fig or plt.gcf())), metadata={"image/png": {"alt": alt}})


def engine_map(day):
    """The whole engine as boxes: those of `day` lit, earlier days' plain, later days' dashed."""
    fig, ax = canvas(3.9, xlim=(-0.05, 10.05), ylim=(-0.3, 9.6),
                     title=f"The engine, day {day} lit (an arrow means “uses”)")
    for start, end in MAP_ARROWS:
        arrow(ax, start, end)
    for name, module, days, x, y, w in ENGINE_MAP:
        lit, known = day in days, any(d < day for d in days)
        color = ORANGE if lit else BLUE if known else FAINT
        box(ax, x, y, w, 1.6, color=color, fill=tint(color, 0.55 if lit else 0.82 if known else 1),
            dashed=not (lit or known))
        ink = INK if lit or known else FAINT
        note(ax, x + w / 2, y + 1.0, name, ink, 9.5, "center", fontweight="bold" if lit else None)
        when = f"day {', '.join(map(str, days))}" if days else "appendices A, B"
        note(ax, x + w / 2, y + 0.42, f"{module} · {when}" if module else when, ink, 7.5, "center")
    show(f"The parts of the engine as boxes with arrows between them; those of day {day} are lit: "
         + ", ".join(name for name, _, days, *_ in ENGINE_MAP if day in days))
