"""Members of other packages that are built on: found in the versions installed, and missed by name."""

import importlib
import inspect
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_slideformer
from hf_slideformer import (
    SlideAccelerator,
    SlideTrainer,
    UnsupportedVersionError,
    compatibility,
)
from hf_slideformer.compatibility import (
    GROUPS,
    SUPPORTED,
    TRAINER,
    Member,
    check,
)
from hf_slideformer.trainer import SlideTrainerMixin
from hf_slideformer.trainer_checkpoints import CheckpointMixin, _reads_saved
from tests.engine.loop import prepare, tiny_llama

ROOT = Path(__file__).parents[1]
MEMBERS = [member for members in GROUPS.values() for member in members]


def trainer(tmp_path, cls=SlideTrainer):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    return cls(model=tiny_llama(), args=args)


@pytest.mark.parametrize("when", GROUPS)
def test_everything_is_there(when):
    check(GROUPS[when])


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.places[0])
def test_a_missing_member_is_named_with_its_package_and_version(member, monkeypatch):
    for place in member.places:
        module_name, _, path = place.partition(":")
        *owners, name = path.split(".")
        owner = importlib.import_module(module_name)
        for part in owners:
            owner = getattr(owner, part)
        if member.used_by:
            for user in member.used_by:
                monkeypatch.setattr(owner, user, lambda self: None)
        elif isinstance(owner, (type, types.ModuleType)):
            _hide(monkeypatch, owner, name)
        else:
            _hide(monkeypatch, importlib.import_module(module_name), owners[0])
    with pytest.raises(UnsupportedVersionError) as error:
        check((member,))
    assert importlib.metadata.version(member.package) in str(error.value)
    assert member.places[0].replace(":", ".") in str(error.value)
    assert member.breaks in str(error.value)
    assert SUPPORTED[member.package][0] in str(error.value)


def _hide(monkeypatch, owner, name):
    """As if `owner` had no `name`; classes of C cannot be changed, so they are stood in for."""
    find = compatibility._find
    hidden = getattr(owner, name, None)
    if hidden is None and not hasattr(owner, name):
        return  # one of two names that a version has

    def find_all_but(place):
        found = find(place)
        return compatibility._MISSING if found is hidden or place.endswith(f":{name}") else found

    try:
        holders = [cls for cls in owner.__mro__ if name in vars(cls)] if isinstance(owner, type) else [owner]
        for holder in holders:
            monkeypatch.delattr(holder, name)
    except TypeError:
        holders = []
    if not holders or hasattr(owner, name):
        monkeypatch.setattr(compatibility, "_find", find_all_but)


def test_a_trainer_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.delattr(Trainer, "_maybe_log_save_evaluate")
    with pytest.raises(
        UnsupportedVersionError, match=r"has no transformers\.trainer\.Trainer\._maybe_log_save"
    ):
        trainer(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_that_is_there_but_never_called_is_refused(tmp_path, monkeypatch):
    # Upstream renames it and keeps the old name for subclasses that call it.
    def renamed(self, *args, **kwargs):
        return self._save_a_checkpoint(*args, **kwargs)

    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", renamed)
    with pytest.raises(
        UnsupportedVersionError, match=r"no longer calls transformers\.trainer\.Trainer\._save_check"
    ):
        trainer(tmp_path)


def test_a_new_parameter_of_an_overridden_method_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self, metrics=None: None)
    with pytest.raises(UnsupportedVersionError, match="added the parameter `metrics` to"):
        trainer(tmp_path)


def test_an_accelerator_that_keeps_its_models_elsewhere_is_refused(fresh_accelerate_state, monkeypatch):
    from accelerate.accelerator import Accelerator

    monkeypatch.setattr(Accelerator, "prepare_model", lambda self, model, **kwargs: self._kept.append(model))
    with pytest.raises(UnsupportedVersionError, match=r"no longer uses, in `prepare_model`, .*_models"):
        SlideAccelerator(cpu=True)


def test_a_model_is_refused_where_recorded_outputs_would_lose_their_gradients(monkeypatch):
    from transformers.utils import output_capturing

    monkeypatch.delattr(output_capturing, "_active_collector")
    with pytest.raises(UnsupportedVersionError, match="router logits"):
        prepare(tiny_llama())


def test_recorders_that_keep_outputs_in_another_way_are_noticed():
    from transformers.utils.output_capturing import _active_collector

    from hf_slideformer.engine.run.recorders import captured

    token = _active_collector.set({"router_logits": [1], "_hidden_states_layers": {0}})
    assert captured() == {"router_logits": [1]}
    _active_collector.set({"router_logits": (1,)})
    try:
        with pytest.raises(UnsupportedVersionError, match="'router_logits' in a tuple"):
            captured()
    finally:
        _active_collector.reset(token)


def test_an_import_that_fails_names_the_version(monkeypatch):
    from transformers import core_model_loading

    for name in [name for name in sys.modules if name.startswith("hf_slideformer.checkpoint")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "hf_slideformer.accelerator")
    monkeypatch.delattr(core_model_loading, "revert_weight_conversion")
    with pytest.raises(
        UnsupportedVersionError, match="revert_weight_conversion, which hf_slideformer relies on"
    ):
        hf_slideformer.SlideAccelerator  # noqa: B018 - imports it


def test_another_failing_import_is_left_as_it_is():
    error = ImportError("no such library")
    assert compatibility.explained(error) is error


def test_all_private_methods_of_trainer_that_are_overridden_are_checked():
    overridden = {
        name
        for cls in (SlideTrainerMixin, CheckpointMixin)
        for name in vars(cls)
        if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    }
    assert overridden - {member.last_name for member in TRAINER} == set()


def test_what_is_said_to_be_overridden_is():
    ours = {name for cls in (SlideTrainerMixin, CheckpointMixin) for name in vars(cls)}
    # A checkpoint that is being written shadows this one on the instance.
    assert {member.last_name for member in TRAINER if member.is_called} - ours == {"_get_output_dir"}


def test_all_imported_private_names_are_checked():
    listed = {place.replace(":", ".") for member in MEMBERS for place in member.places}
    pattern = re.compile(r"^\s*from ((?:transformers|accelerate|trl|peft)[\w.]*) import (.*)$", re.M)
    for path in [*(ROOT / "hf_slideformer").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for module, names in pattern.findall(path.read_text(encoding="utf-8")):
            for name in re.findall(r"\b_\w+", names.split("#")[0]):
                assert any(place.startswith(f"{module}.{name}") for place in listed), (path, name)


def test_a_logger_whose_switch_is_gone_is_waited_for():
    def logger(**attributes):
        kind = type(
            "WandbCallback",
            (TrainerCallback,),
            {"on_save": lambda *_, **__: None, "__module__": "transformers.integrations.integration_utils"},
        )
        callback = kind()
        vars(callback).update(attributes)
        return callback

    assert not _reads_saved(logger(_log_model=False))
    assert _reads_saved(logger(_log_model=True))
    assert _reads_saved(logger())


def test_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [
        *project["dependencies"],
        *(x for extra in project["optional-dependencies"].values() for x in extra),
    ]
    oldest = dict(
        re.fullmatch(r"(\w+)>=([\d.]+)", text).groups() for text in asked if re.match(r"\w+>=[\d.]+$", text)
    )
    for package, (lowest, _) in SUPPORTED.items():
        assert oldest[package] == lowest
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for package in ("transformers", "accelerate"):
        assert f"OLDEST_{package.upper()} := {SUPPORTED[package][0]}." in makefile


def test_the_page_lists_what_is_checked():
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", page, re.M)
    listed = {place: breaks for places, breaks in rows for place in re.findall(r"`([^`]+)`", places)}
    for member in MEMBERS:
        for place in member.places:
            assert listed.get(place.replace(":", ".")) == member.breaks, place
    known = {place.replace(":", ".") for member in MEMBERS for place in member.places}
    checked = page.partition("## Found by structure")[0]
    assert {
        place
        for place in re.findall(r"^\| (.*?) \|", checked, re.M)
        for place in re.findall(r"`([^`]+)`", place)
    } == known
    for when in GROUPS:
        assert f"### When {when}" in page
    for package, (lowest, newest) in SUPPORTED.items():
        assert f"| {package} | {lowest} | {newest} |" in page


def test_a_member_knows_where_it_is():
    member = Member(("torch.autograd:Variable._execution_engine.queue_callback",), "")
    assert (member.package, member.last_name) == ("torch", "queue_callback")
    assert Member(("torch._C:_x",), "").owner == "torch._C"
    assert inspect.ismodule(compatibility._find("os:path"))
