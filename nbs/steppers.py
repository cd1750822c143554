"""Pictures that one steps through: `stepper(frames, captions, alt)`.

A stepper is plain HTML and CSS in the output of a cell: no script, no server, no widget. It works
in Jupyter, in VS Code and in a page made by nbconvert. Where a page takes the style away (GitHub
does) the captions remain as a list, and a PNG below shows the frames that matter.
"""

import hashlib
import io
from base64 import b64encode
from html import escape

from IPython.display import HTML, Image, display
from matplotlib.figure import Figure
from PIL import Image as Pixels

from figures import BLUE, FAINT, INK, PAPER, WIDTH, png, show  # noqa: F401 (show: as there)

# {id}: a name that no other stepper of the page has. The radio button that is on decides which
# frame is seen; the two arrows of a frame are labels of the radio buttons beside it. The last rule
# hides the still where all this works.
STYLE = """
#{id} {{max-width:{width}px; padding:8px 10px; border:1px solid {faint}; border-radius:6px;
  background:{paper}; color:{ink}; font:14px/1.4 sans-serif; position:relative}}
#{id} input {{position:absolute; opacity:0}}
#{id} label {{display:inline-block; min-width:1.2em; margin:0 3px 6px 0; padding:2px 6px;
  border:1px solid {faint}; border-radius:4px; text-align:center; cursor:pointer; color:{ink}}}
#{id} input:focus-visible + label {{outline:2px solid {blue}}}
#{id} input:checked + label {{background:{blue}; color:white; border-color:{blue}}}
#{id} ol {{list-style:none; margin:0; padding:0; clear:both}}
#{id} li {{display:none; margin:0}}
#{id} li label {{margin:0 6px 0 0; padding:2px 12px}}
#{id} img {{display:block; width:100%; margin:6px 0 0}}
{seen} {{display:block}}
.jp-OutputArea-child:has(#{id}) + .jp-OutputArea-child,
.output_area:has(#{id}) + .output_area {{display:none}}
"""


def _bytes(frame: Figure | str) -> tuple[bytes, str]:
    """A frame's picture and its media type; a figure is drawn in at most 64 colours and closed."""
    if isinstance(frame, str):
        return frame.encode(), "image/svg+xml"
    return png(frame), "image/png"


def _stack(pngs: list[bytes]) -> bytes:
    """PNGs of equal width, one below the other, as one."""
    parts = [Pixels.open(io.BytesIO(png)) for png in pngs]
    whole = Pixels.new("RGB", (parts[0].width, sum(part.height for part in parts)), PAPER)
    top = 0
    for part in parts:
        whole.paste(part.convert("RGB"), (0, top))
        top += part.height
    out = io.BytesIO()
    whole.quantize(64, dither=Pixels.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def stepper(frames: list[Figure | str], captions: list[str], alt: str,
            still: list[int] = (-1,)) -> None:
    """Show frames one at a time, with a button for each and one forwards and one back.

    frames: matplotlib figures of one size, or SVG documents as strings (each from `<svg` to
    `</svg>`, with its xmlns); do not mix the two. captions: a sentence for each frame, plain text:
    what happened since the frame before. alt: what there is to see in all of them, for readers who
    do not see the pictures. still: numbers of the frames (from 0, negative from the end) that
    stand below one another in the PNG for pages that cannot step; of SVG frames, one.

        stepper([draw(state) for state in states], ["two blocks are taken", …], "A pool of …")

    After a click on a number the arrow keys work. ValueError if a frame has no caption.
    """
    if not frames or len(frames) != len(captions):
        raise ValueError(f"{len(frames)} frames and {len(captions)} captions: give one for each")
    pictures = [_bytes(frame) for frame in frames]
    kinds = {kind for _, kind in pictures}
    if len(kinds) > 1 or (kinds == {"image/svg+xml"} and len(still) > 1):
        raise ValueError("frames are all figures, or all SVG; of SVG one frame is the still")
    n, every = len(frames), hashlib.blake2b(digest_size=4)
    for (picture, _), caption in zip(pictures, captions):
        every.update(picture + caption.encode())
    name = f"steps-{every.hexdigest()}"
    seen = ",\n".join(f"#{name} #{name}-{i}:checked ~ ol li:nth-child({i + 1})" for i in range(n))
    style = STYLE.format(id=name, width=round(100 * WIDTH) + 22, seen=seen, blue=BLUE, faint=FAINT,
                         ink=INK, paper=PAPER)
    buttons = "".join(
        f'<input type="radio" name="{name}" id="{name}-{i}"{" checked" if i == 0 else ""}>'
        f'<label for="{name}-{i}">{i + 1}</label>' for i in range(n))
    items = "".join(
        f'<li><label for="{name}-{max(i - 1, 0)}">◀</label>'
        f'<label for="{name}-{min(i + 1, n - 1)}">▶</label><b>{i + 1}.</b> {escape(caption)}'
        f'<img src="data:{kind};base64,{b64encode(picture).decode()}" alt="{escape(caption)}"></li>'
        for i, ((picture, kind), caption) in enumerate(zip(pictures, captions)))
    display(HTML(f'<div id="{name}" role="group" aria-label="{escape(alt)}"><style>{style}</style>'
                 f'{buttons}<ol>{items}</ol></div>'))
    chosen = [pictures[i] for i in still]
    if kinds == {"image/png"}:
        display(Image(_stack([png for png, _ in chosen])), metadata={"image/png": {"alt": alt}})
    else:
        display({"image/svg+xml": chosen[0][0].decode()}, raw=True,
                metadata={"image/svg+xml": {"alt": alt}})
