"""nbs/steppers.py: what one can step through also says what it shows, and has a still."""

import re

import pytest
from figures import canvas, plt
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from steppers import show, stepper

SVG = ('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">'
       '<rect width="3" height="3"/></svg>')


@pytest.fixture(autouse=True)
def shell():
    plt.switch_backend("agg")
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def outputs(call, *args, **kwargs):
    with capture_output() as captured:
        call(*args, **kwargs)
    return [(output.data, output.metadata) for output in captured.outputs]


def test_figures():
    before = plt.get_fignums()
    frames = [canvas(1.0, title=f"{i}")[0] for i in range(3)]
    (page, _), (still, said) = outputs(stepper, frames, ["a", "b < c", "d"], "three of them",
                                       still=[0, 2])
    html = page["text/html"]
    assert html.count('type="radio"') == html.count("data:image/png;base64,") == 3
    assert html.count(" checked") == 1 and "<script" not in html
    assert re.findall(r'alt="([^"]*)"', html) == ["a", "b &lt; c", "d"]
    assert "image/png" in still and said["image/png"]["alt"] == "three of them"
    assert plt.get_fignums() == before


def test_two_on_a_page_do_not_mix():
    (first, _), _ = outputs(stepper, [SVG, SVG], ["a", "b"], "one")
    (second, _), (still, _) = outputs(stepper, [SVG, SVG], ["a", "c"], "two")
    names = [re.search(r'id="(steps-\w+)"', page["text/html"])[1] for page in (first, second)]
    assert names[0] != names[1] and still["image/svg+xml"] == SVG


@pytest.mark.parametrize("frames, captions", [([], []), ([SVG], []), ([SVG], ["a", "b"])])
def test_a_caption_for_each(frames, captions):
    with pytest.raises(ValueError, match="one for each"):
        stepper(frames, captions, "nothing")


def test_a_figure_that_is_shown():
    canvas(1.0)
    ((picture, said),) = outputs(show, "an empty figure")
    assert "image/png" in picture and said["image/png"]["alt"] == "an empty figure"
