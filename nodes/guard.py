"""Guarding a model: every prompt that it is asked to draw is steered, however it was wired."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import ref

from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..backbones.comfy import GUARD, WORDS_AGAIN, without_words
from ..region import Region, RegionError, apply_to_conditioning
from ..region.blocks import CROSS_ATTENTION
from ..region.conditioning import ACTED, other_texts, steer_poses, text_tensors
from ..region.inspection import Judgement, judge, together
from ..region.known import check_known
from .belonging import belonging
from .common import KEEP_OUT, SafeRegionType, gate_rows, prompt_server, schema, send_event, status, steering_inputs
from .guidance import led_away
from .steering_status import doubts, steering_status

STATUS = "safe_region.status"
TITLE = "Guard Model with Safe Region (Moderation)"
MOST_PROMPTS = 100  # whose samplings a guard remembers


def as_entries(conds: list[dict[str, Any]]) -> list[list[Any]]:
    """A sampler's conditions as entries of a conditioning; there an entry is one dict that holds its text too."""
    return [[cond.get(CROSS_ATTENTION), cond] for cond in conds]


def as_conds(entries: list[list[Any]]) -> list[dict[str, Any]]:
    """And back."""
    return [options if text is None else {**options, CROSS_ATTENTION: text} for text, options in entries]


def refuse_windows(options: Mapping[str, Any], entries: Iterable[list[Any]], start: float, end: float) -> None:
    """Raises RegionError where context windows hand one prompt to each window, and a range makes three of one."""
    if not getattr(options.get("context_handler"), "split_conds_to_windows", False):
        return
    ranges = [(start, end), *((entry.get("start_percent", 0.0), entry.get("end_percent", 1.0))
                              for _, entry in entries if ACTED in entry)]  # fmt: skip
    if any(found != (0, 1) for found in ranges):
        raise RegionError(
            "These context windows give each window a prompt of its own (split_conds_to_windows), which would be mixed "
            'up by a region that acts for a share of sampling: set start to 0 and end to 1 in the guard and in "Apply '
            'Safe Region".'
        )


def refuse_merging(_: Any, model: Any) -> None:
    """Let a model say no to a merge that takes its weights and leaves its guard. As a callback, clones do so too."""
    weights_of, this = type(model).get_key_patches, ref(model)

    def get_key_patches(filter_prefix: str | None = None) -> dict[str, Any]:
        if filter_prefix is not None:  # as merges ask; hooks do without
            raise RegionError(
                f'This merge takes the weights of a guarded model and loses its guard: merge first, then put "{TITLE}" '
                "behind the merge."
            )
        return weights_of(this())

    model.get_key_patches = get_key_patches


def all_text(entry: list[Any]) -> list[Any]:
    return [tensor for text in (entry, *other_texts(entry)) for tensor in text_tensors(text).values()]


def running_prompt() -> str:
    return str(getattr(prompt_server(), "last_prompt_id", None) or "")


def with_latest(kept: Mapping[str, Any], prompt: str, value: Any) -> dict[str, Any]:
    """What is kept of the last prompts, with this one's at the end."""
    others = [(name, of) for name, of in kept.items() if name != prompt]
    return dict(others[1 - MOST_PROMPTS :]) | {prompt: value}


class Guard:
    """One guard in a model. `record` says what it did, in the very object that ComfyUI keeps for its history."""

    def __init__(self, node_id: str | None, region: Region, *how: Any, about: Sequence[tuple[str, str]] = ()) -> None:
        """`how`: strength, mode, start, end, unknown_text, as `apply_to_conditioning` has them. `about`: lines, with
        their tones, that are told in any case."""
        self.node_id, self.region, self.how, self.about = node_id, region, how, list(about)
        self.judged: dict[str, list[Judgement]] = {}  # what its samplings in each prompt were given
        self.drawn: list[set[str]] = []  # the names of prompts that the samplings that run now lead towards
        self.later: list[bool] = []  # whether some text of these samplings is made only when their steps begin
        waiting = status([("On guard; no sampler has used this model yet.", "neutral"), *about, *doubts(region)])
        self.record = {"heading": "", "samplings": 0, "in_prompts": {}, "gate": {}, **waiting}

    def __deepcopy__(self, memo: Any) -> Guard:
        return self  # with a copy of a model's options, too, it is the same guard

    def steer(self, conditioning: list[Any]) -> list[Any]:
        """The entries steered; those without any text, as of a model that runs on a picture alone, as they are."""
        if not conditioning:  # says what is wrong with the region or the numbers
            return apply_to_conditioning([], self.region, *self.how)
        steered = []
        for entry in conditioning:
            if WORDS_AGAIN in entry[1]:
                self.check_later(entry[1])
                steered.append(entry)
            elif all_text(entry):
                steered += apply_to_conditioning([entry], self.region, *self.how)
            else:
                check_known([entry], self.how[-1])
                steered.append(entry)
        return steered

    def check_later(self, options: Mapping[str, Any]) -> None:
        """Raises RegionError for a prompt of Anima that cannot be steered when the steps begin."""
        check_known([[None, without_words(options)]], self.how[-1])
        if self.how[2:4] != (0, 1):
            raise RegionError(
                "This model (Anima) makes its text as sampling begins, so a region acts from the first step to the "
                "last: set start to 0 and end to 1 in the guard."
            )

    def into(self, model: Any) -> Any:
        """A copy of the model with this guard."""
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, GUARD, self.sample)
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, GUARD, self.prepare)
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, GUARD, self.begin)
        model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, GUARD, self.refuse_going_around)
        model.add_callback_with_key(CallbacksMP.ON_CLONE, GUARD, refuse_merging)
        refuse_merging(None, model)
        return model

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wraps a sampling: its guider's prompts are steered first."""
        guider, sampler = executor.class_obj, args[2] if len(args) > 2 else kwargs.get("sampler")
        drawn = set(guider.conds) - led_away(guider, sampler)
        entries = [entry for name in sorted(drawn) for entry in as_entries(guider.conds[name])]
        refuse_windows(guider.model_options, entries, *self.how[2:4])
        self.act(drawn, guider.conds)
        texts = [entry for entry in entries if all_text(entry) and WORDS_AGAIN not in entry[1]]
        self.drawn.append(drawn)
        self.later.append(any(WORDS_AGAIN in options for _, options in entries))
        try:
            if texts or not self.later[-1]:
                self.look(texts)
            done = executor(*args, **kwargs)
            if self.later[-1]:
                raise RegionError("This sampler goes past the place where the prompt of this model (Anima) can be "
                                  "guarded: use one of ComfyUI's own.")  # fmt: skip
            return done
        finally:
            self.drawn.pop()
            self.later.pop()

    def look(self, texts: list[list[Any]]) -> None:
        """Says what the region does with the texts of the sampling that runs."""
        told = steering_status(self.judge(texts), texts, self.region, *self.how[:4]) + self.about
        if "negative" in self.drawn[-1]:
            told.append(("Negative prompts were guarded too: this sampler may draw them.", "neutral"))
        self.tell(told)

    def begin(self, executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
        """Wraps the steps of a sampling: text that the model has made for them meanwhile is steered here."""
        if self.drawn and self.later[-1]:
            texts: list[list[Any]] = []
            for name in self.drawn[-1] & set(guider.conds):
                guider.conds[name] = [self.steer_made(cond, texts) for cond in guider.conds[name]]
            self.later[-1] = False
            self.look(texts)
        return executor(guider, *args, **kwargs)

    def steer_made(self, cond: dict[str, Any], texts: list[list[Any]]) -> dict[str, Any]:
        """A condition whose text its model has made, steered; that text is added to `texts`."""
        if WORDS_AGAIN not in cond:
            return cond
        made = cond.get("model_conds", {})
        read = made.get("c_crossattn")
        if WORDS_AGAIN in made or not isinstance(getattr(read, "cond", None), Tensor):
            raise RegionError("This version of ComfyUI does not make the text of this model (Anima) where a guard can "
                              "look at it: update ComfyUI.")  # fmt: skip
        texts.append([read.cond, {}])
        ((text, _),) = apply_to_conditioning(texts[-1:], self.region, *self.how)
        return cond if text is read.cond else {**cond, "model_conds": {**made, "c_crossattn": read._copy_with(text)}}

    def prepare(self, executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
        """Wraps what follows all that wraps a sampling: text that another pack has put in meanwhile is steered too."""
        if self.drawn and (added := self.act(self.drawn[-1], conds)):
            self.judge(added)
        return executor(model, noise_shape, conds, *args, **kwargs)

    def act(self, drawn: set[str], conds: dict[str, Any]) -> list[list[Any]]:
        """Steers the prompts in place; returns the entries that nothing had steered as strongly before."""
        fresh = []
        for name in drawn & set(conds):
            before = as_entries(conds[name])
            known = {id(tensor) for entry in before for tensor in all_text(entry)}
            steered = self.steer(before)
            conds[name] = as_conds(steered)
            fresh += [entry for entry in steered if {id(tensor) for tensor in all_text(entry)} - known]
        for name in set(conds) - drawn:  # the pose's text of a positive prompt is in the negative one, too
            others = as_entries(conds[name])
            conds[name] = as_conds(steer_poses(others, self.region, *self.how))
        return fresh

    def judge(self, entries: list[list[Any]]) -> list[Judgement]:
        """What the gates say of these prompts, which the region fits; kept with what the running prompt had before."""
        judged, prompt = judge(entries, self.region), running_prompt()
        found = together([self.judged.get(prompt, judged), judged])
        self.judged = with_latest(self.judged, prompt, found)
        self.record["gate"] = {name: gate_rows(rows) for name, rows in self.judged.items()}
        return judged

    def refuse_going_around(self, _: Any) -> None:
        """Called before a model runs."""
        if not self.drawn:
            raise RegionError(
                "This guarded model is about to run past its guard, as the model for negative prompts alone or by a "
                f'node that takes guards out: connect "{TITLE}" right before the sampler, to its model input.'
            )

    def tell(self, told: list[tuple[str, str]]) -> None:
        record, prompt = self.record, running_prompt()
        record["samplings"] += 1  # fields are replaced whole: ComfyUI reads them in another thread
        record["in_prompts"] = with_latest(record["in_prompts"], prompt, record["in_prompts"].get(prompt, 0) + 1)
        record |= {"heading": f"Acted in {record['samplings']} sampling{'s' * (record['samplings'] > 1)}, last:"}
        record |= status(told)
        send_event(STATUS, {"node": self.node_id, **record})


class SafeRegionGuardModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionGuardModel",
            display_name=TITLE,
            description="Steers every prompt that a sampler draws through this model, whichever nodes made it. Place "
            "it between the model's loader and the sampler, after merges. Prompts that Apply Safe Region already "
            "steered as strongly are not moved again; negative prompts are left alone where they lead away, as at any "
            "guidance of 1 or more.",
            is_output_node=True,  # so that the history of every run has its record, when it comes from the cache, too
            search_aliases=[*KEEP_OUT, "guard", "guardrail", "safeguard", "protect", "parental controls"],
            inputs=[
                io.Model.Input("model", tooltip="The model to guard. It is not changed: its weights stay as they are."),
                SafeRegionType.Input("region", tooltip="The safe region, learned with this model's text encoder."),
                *steering_inputs(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guarded model, for the sampler.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, region: Region, strength: float = 1.0, mode: str = "auto", start: float = 0.0,
        end: float = 1.0, unknown_text: str = "refuse",
    ) -> io.NodeOutput:  # fmt: skip
        about = belonging(region, model, cls.hidden.prompt, cls.hidden.unique_id)
        how = (strength, mode, start, end, unknown_text == "allow")
        guard = Guard(cls.hidden.unique_id, region, *how, about=about)
        guard.steer([])  # says now what would be wrong with the region or the numbers
        # the page shows the record; `text` is for those who know no records
        waiting = status([("On guard. What it did is told in safe_region_guard.", "neutral"), *about, *doubts(region)])
        return io.NodeOutput(guard.into(model), ui={**waiting, "safe_region_guard": [guard.record]})
