"""The drawings of the pages, by name."""

from __future__ import annotations

from collections.abc import Callable
from math import comb

from svg import BLOCK, INK, RESIDUAL, Canvas

LAYERS = 4
WIDTH = 720


def paths() -> Canvas:
    """What iterate k holds of a chain of four layers: the paths that end at or below row k."""
    drawing = Canvas(WIDTH, 300, "All paths from x4 back to x0, by the number of blocks they cross, for k = 0, 1, 2")
    step, rise, bottom = 44, 40, 228
    for k in range(3):
        left = 36 + 240 * k
        total = sum(comb(LAYERS, n) for n in range(k + 1))
        drawing.text((left + 2 * step, 16), f"k = {k}", 16, weight="bold")
        drawing.text((left + 2 * step, 38), f"{total} of {2**LAYERS} paths to x{_below(0)}", 13)
        for n in range(LAYERS + 1):
            counted = n <= k
            strength = {"opacity": 1.0, "width": 2.2} if counted else {"opacity": 0.3, "width": 1.2}
            for i in range(LAYERS - n, -1, -1):
                x, y = left + i * step, bottom - n * rise
                if i + n < LAYERS:
                    drawing.line((x + step - 7, y), (x + 8, y), RESIDUAL, arrow=True, **strength)
                if n:
                    drawing.line((x + step - 6, y + rise - 5), (x + 7, y + 6), BLOCK, arrow=True, **strength)
                drawing.disc((x, y), 4, INK if counted else "gray", 1.0 if counted else 0.3)
            if counted:
                drawing.text((left - 22, bottom - n * rise), f"d{_below(n)}", 14)
        for i in range(LAYERS + 1):
            drawing.text((left + i * step, bottom + 22), f"x{_below(i)}", 14)
    drawing.text((WIDTH / 2 - 20, bottom + 56), "blue: a scan moves along a row", 14, RESIDUAL, "end")
    drawing.text((WIDTH / 2 + 20, bottom + 56), "orange: all blocks at once, up a row", 14, BLOCK, "start")
    return drawing


def chunks() -> Canvas:
    """A chain of twelve layers in stages of four: exact inside, Highway-BP across."""
    drawing = Canvas(WIDTH, 240, "Twelve layers in three stages of four: exact backprop inside, Highway-BP across")
    step, left, line = 54, 36, 142
    for s in range(3):
        first = left + 4 * s * step
        drawing.box((first + 9, line - 26), (4 * step - 18, 56), fill=0.06)
        drawing.text((first + 2 * step, line + 48), f"stage {s}", 14)
        start, end = first + 4 * step - 2, first + 2
        bend = f"C {start - 40} {line - 96} {end + 40} {line - 96} {end} {line - 12}"
        drawing.path(f"M {start} {line - 12} {bend}", RESIDUAL, 2.2, arrow=True)
        drawing.text((first + 2 * step, line - 88), "RᵀRᵀRᵀRᵀ", 14, RESIDUAL)
    for i in range(13):
        x, border = left + i * step, i % 4 == 0
        drawing.disc((x, line), 6 if border else 4, INK, 1.0 if border else 0.5)
        drawing.text((x, line + 19), f"x{_below(i)}", 13)
        if i < 12:
            drawing.line((x + step - 7, line), (x + 9, line), BLOCK, width=2, arrow=True)
    drawing.text(
        (left, 16), "across: one scan over the stages, by their products of residual maps", 14, RESIDUAL, "start"
    )
    drawing.text((left, 222), "inside: exact, layer after layer, all stages at once", 14, BLOCK, "start")
    return drawing


def rounds() -> Canvas:
    """What four devices with one stage each do in the backward pass: in turns, or by Highway-BP with k = 1."""
    drawing = Canvas(WIDTH, 268, "The backward pass of four devices: exact, in turns, and by Highway-BP with k = 1")
    unit, height, top = 40, 34, 40

    def task(x: float, device: int, length: float, words: str, color: str, fill: float = 0.3) -> None:
        y = top + (3 - device) * (height + 5)
        drawing.box((x + 1, y), (length * unit - 2, height), color, fill, 3)
        drawing.text((x + length * unit / 2, y + height / 2), words, 13)

    panels = (76, "exact: one device after another", 7.0), (456, "Highway-BP, k = 1: all at once", 5.0)
    for left, name, length in panels:
        drawing.text((left, 16), name, 15, anchor="start", weight="bold")
        bottom = top + 4 * (height + 5) + 6
        drawing.line((left, bottom), (left + length * unit + 8, bottom), arrow=True)
        drawing.text((left + length * unit + 8, bottom + 14), "time", 13, anchor="end")
    for device in range(LAYERS):
        drawing.text((68, top + (3 - device) * (height + 5) + height / 2), f"device {device}", 13, anchor="end")
        task(76 + (3 - device) * 1.4 * unit, device, 1.4, f"J{_below(device)}ᵀ", BLOCK)
        task(76 + 5.6 * unit, device, 1.4, "∂θ", INK, 0.08)
        for start, length, words, color in (
            (0.0, 1.1, "scan", RESIDUAL),
            (1.1, 1.4, f"B{_below(device)}ᵀ", BLOCK),
            (2.5, 1.1, "scan", RESIDUAL),
        ):
            task(456 + start * unit, device, length, words, color)
        task(456 + 3.6 * unit, device, 1.4, "∂θ", INK, 0.08)
    drawing.text((WIDTH / 2, 252), "∂θ: each device's weight gradients, from its last state's cotangent", 14)
    return drawing


def decision() -> Canvas:
    """Which method pays: what is sequential, what hardware, which batch."""
    drawing = Canvas(WIDTH, 460, "A decision chart; the paragraphs below say the same in words")
    width, height = 168, 74

    def box(x: float, y: float, words: str, color: str, radius: float) -> None:
        drawing.box((x - width / 2, y), (width, height), color, 0.14, radius)
        drawing.text((x, y + height / 2 - 8.1 * words.count("\n")), words, 13)

    def ask(x: float, y: float, words: str) -> None:
        box(x, y, words, RESIDUAL, 18)

    def answer(x: float, y: float, words: str, color: str = BLOCK) -> None:
        box(x, y, words, color, 3)

    def go(start: tuple[float, float], end: tuple[float, float], words: str) -> None:
        left = end[0] < start[0]
        drawing.line((start[0], start[1] + height + 2), (end[0], end[1] - 4), arrow=True)
        place = ((start[0] + end[0]) / 2 + (-12 if left else 12), (start[1] + height + end[1]) / 2 - 6)
        drawing.text(place, words, 13, anchor="end" if left else "start")

    top, second, third, last = 10, 128, 246, 364
    ask(360, top, "What must happen\nin turn in your\nbackward pass?")
    go((360, top), (180, second), "steps of time")
    go((360, top), (540, second), "layers in depth")
    ask(180, second, "On which hardware?")
    go((180, second), (90, third), "GPU")
    go((180, second), (270, third), "CPU")
    ask(540, second, "On how many\ndevices?")
    go((540, second), (450, third), "one")
    go((540, second), (630, third), "several")
    ask(90, third, "Is B·H² below\nabout 4·10⁷?")
    answer(270, third, "hb.GRU, hb.LSTM: exact;\nk = 1 to 3 where weights\nare slow to read")
    answer(450, third, "plain autograd, but for\nmany small equal layers", INK)
    ask(630, third, "Microbatches at most\n(P − 1) / (k + 1)?")
    go((90, third), (90, last), "yes")
    go((90, third), (270, last), "no")
    go((630, third), (450, last), "no")
    go((630, third), (630, last), "yes")
    answer(90, last, "hb.GRU, hb.LSTM,\nhb.scan with k, chunk,\nrank (predicted)")
    answer(270, last, "cuDNN, exact", INK)
    answer(450, last, "a pipeline: 1F1B or\nzero bubble, exact", INK)
    answer(630, last, "hb.DepthParallel,\nhb.ScheduleHighway,\nk = 1 to 3")
    return drawing


DRAWINGS: dict[str, Callable[[], Canvas]] = {
    "paths": paths,
    "chunks": chunks,
    "rounds": rounds,
    "decision": decision,
}


def _below(number: int) -> str:
    """A subscript."""
    return "".join(chr(0x2080 + int(digit)) for digit in str(number))
