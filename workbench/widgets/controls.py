"""The dials and buttons of a playground: ipywidgets, laid out, and read as one `Wish`.

Nothing is computed here; every change calls `changed` at once, and the caller drops what is overtaken.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from workbench.interventions import KV, Intervention
from workbench.models import LM, ModelError
from workbench.widgets.wishes import MOVABLE, PLACED, Wish, layers_of, spans_of

GIVEN = "as given"
EXAMPLE = "choose an example"
VECTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # strengths of a map: for kinds that add
OTHERS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # and for those that are whole at 1
WIDE = {"description_width": "92px"}
__all__ = ["Controls"]


class Controls:
    """Every dial by the name of its field in `Wish`, and `buttons` by name; `panel` shows all of them."""

    def __init__(
        self,
        lm: LM,
        interventions: Mapping[str, Intervention | None],
        prompts: Sequence[str],
        strengths: Sequence[float] | None,
        defaults: Wish,
    ) -> None:
        self.lm, self.interventions, self.own_strengths = lm, interventions, strengths
        self.changed: Callable[[], None] = lambda: None
        self.quiet = False  # while several dials are set at once
        self._make_dials(prompts, defaults)
        self._make_buttons()
        self.fit()
        for dial in self.dials.values():
            dial.observe(self._moved, names="value")
        self.examples.observe(self._example, names="value")

    def _make_dials(self, prompts: Sequence[str], defaults: Wish) -> None:
        import ipywidgets as w

        def wide(width: str) -> Any:
            return w.Layout(width=width)

        shorter = [(prompt if len(prompt) < 90 else f"{prompt[:88]} …", prompt) for prompt in prompts]
        self.examples = w.Dropdown(
            options=[(EXAMPLE, ""), *shorter], description="examples", layout=wide("99%"), style=WIDE
        )
        self.dials: dict[str, Any] = {
            "name": w.Dropdown(
                options=list(self.interventions), description="change", layout=wide("300px"), style=WIDE
            ),
            "layer": w.SelectionSlider(
                options=[(GIVEN, GIVEN)], description="layer", layout=wide("330px"), style=WIDE, continuous_update=True
            ),
            "strength": w.FloatSlider(
                value=defaults.strength, min=-4, max=12, step=0.1, description="strength", layout=wide("460px"),
                style=WIDE, continuous_update=True, readout_format=".2f",
            ),
            "positions": w.ToggleButtons(
                options=[(GIVEN, GIVEN)], description="acts at", style=WIDE | {"button_width": "96px"}
            ),
            "prompt": w.Textarea(
                value=defaults.prompt, description="prompt", layout=w.Layout(width="99%", height="76px"), style=WIDE,
                continuous_update=False,
            ),
            "max_new_tokens": w.BoundedIntText(
                value=defaults.max_new_tokens, min=1, max=100_000, description="new tokens", layout=wide("190px"),
                style=WIDE,
            ),
            "temperature": w.FloatSlider(
                value=defaults.temperature, min=0, max=2, step=0.1, description="temperature", layout=wide("330px"),
                style=WIDE,
            ),
            "seed": w.BoundedIntText(
                value=defaults.seed, min=0, max=2**31 - 1, description="seed", layout=wide("150px"),
                style={"description_width": "48px"}
            ),
        }  # fmt: skip
        self.dials["name"].value = defaults.name

    def _make_buttons(self) -> None:
        import ipywidgets as w

        def button(text: str, tip: str, style: str = "") -> Any:
            return w.Button(description=text, tooltip=tip, button_style=style, layout=w.Layout(width="130px"))

        self.buttons = {
            "run": button("Write again", "generate with these dials", "primary"),
            "cancel": button("Stop", "stop what is being written or measured", "warning"),
            "map": button("Strength map", "accuracy by strength on a few tuning questions, at this layer and span"),
            "save": button("Save condition", "write this change to a file of the run folder"),
        }
        self.file = w.Text(placeholder="of the dials", description="name", layout=w.Layout(width="240px"), style=WIDE)
        self.figure, self.said = w.HTML(), w.HTML()
        self.said.add_class("wb-said")

    def panel(self, live: Any) -> Any:
        """Everything in one box, with the live tokens in the middle."""
        import ipywidgets as w

        d, b = self.dials, self.buttons
        flow = w.Layout(flex_flow="row wrap", align_items="center")
        box = w.VBox(
            [
                w.HBox([d["name"], d["layer"], d["strength"]], layout=flow),
                d["positions"],
                self.examples,
                d["prompt"],
                w.HBox([d["max_new_tokens"], d["temperature"], d["seed"], b["run"], b["cancel"]], layout=flow),
                live,
                w.HBox([b["map"], self.file, b["save"]], layout=flow),
                self.figure,
                self.said,
            ]
        )
        box.add_class("wb-panel")
        return box

    def wish(self) -> Wish:
        """What the dials say."""
        values: dict[str, Any] = {name: None if d.value == GIVEN else d.value for name, d in self.dials.items()}
        return Wish(**values | {name: round(values[name], 4) for name in ("strength", "temperature")})

    def put(self, **values: Any) -> None:
        """Set dials by the names of `Wish`, without a run in between; ModelError for what they can't be set to."""
        unknown = set(values) - set(self.dials)
        if unknown:
            raise ModelError(f"There is no dial {unknown.pop()!r}. There are: {', '.join(self.dials)}.")
        self.quiet = True
        try:
            if "name" in values:
                self._set("name", values["name"])
                self.fit()
            for name, value in values.items():
                if name != "name":
                    self._set(name, value)
        finally:
            self.quiet = False

    def _set(self, name: str, value: Any) -> None:
        dial = self.dials[name]
        value = GIVEN if value is None else value
        options = [option[1] if isinstance(option, tuple) else option for option in getattr(dial, "options", ())]
        if options and value not in options:
            raise ModelError(f"{name}={value!r} is not to be had here. Allowed: {', '.join(map(repr, options))}.")
        low, high = getattr(dial, "min", None), getattr(dial, "max", None)
        if low is not None and not low <= value <= high:
            raise ModelError(f"{name}={value!r} is outside of the dial's {low:g} to {high:g}.")
        dial.value = value

    def strengths(self) -> list[float]:
        """Of a strength map of the chosen intervention."""
        x = self.interventions[self.dials["name"].value]
        return sorted(self.own_strengths or (VECTORS if _adds(x) else OTHERS))

    def fit(self) -> None:
        """Offer the layers, spans and strengths that the chosen intervention has."""
        x = self.interventions[self.dials["name"].value]
        layer, strength, positions = (self.dials[name] for name in ("layer", "strength", "positions"))
        before, self.quiet = self.quiet, True
        try:
            layers, spans, now = layers_of(x), spans_of(x), getattr(x, "positions", None)
            named = isinstance(now, str)
            layer.options = [(GIVEN, GIVEN), *((f"{each} of 0–{len(self.lm.blocks) - 1}", each) for each in layers)]
            several = len(layers) > 1
            layer.value = layers[len(layers) // 2] if isinstance(x, MOVABLE) and layers else GIVEN
            layer.disabled = not (several and isinstance(x, PLACED))
            positions.options = (
                [(each, each) for each in spans] if named and spans else [(GIVEN, GIVEN), *((s, s) for s in spans)]
            )
            positions.value = now if named and spans else GIVEN
            positions.disabled = not spans
            top, kept = self.strengths()[-1], strength.value
            low = min(-max(1, round(top / 4)), math.floor(self.strengths()[0]))  # whole, so that steps meet 0
            strength.min, strength.max = min(low, kept), max(top, kept)
            strength.value = min(max(kept, low), top)
            strength.min, strength.max, strength.step = low, top, 0.05
            strength.disabled = x is None
        finally:
            self.quiet = before

    def _example(self, change: dict[str, Any]) -> None:
        if change["new"]:
            self.dials["prompt"].value = change["new"]

    def _moved(self, change: dict[str, Any]) -> None:
        if self.quiet:
            return
        if change["owner"] is self.dials["name"]:
            self.fit()
        self.changed()


def _adds(x: Intervention | None) -> bool:
    return x is None or isinstance(x, (*MOVABLE, KV))
