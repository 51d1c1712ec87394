"""Plain scripts under both launchers: really streamed, with the numbers of plain Accelerate; and what is refused."""

import argparse
import datetime
import json
import os
import runpy
from types import SimpleNamespace

import accelerate
import pytest
import torch
import transformers
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.state import AcceleratorState

from hf_slideformer import SlideTrainer, cli, launch
from hf_slideformer.config import CONFIG_VARIABLE
from hf_slideformer.errors import UnsupportedModelError
from tests.trainer import runs

from .conftest import ROOT, TRAIN

SIMPLE_LAUNCHER = accelerate_launch.simple_launcher

CONFIG = {"distributed_type": "NO", "num_processes": 1, "mixed_precision": "no", "use_cpu": True}
STREAM = {"slideformer_config": {"placement": "stream", "update": "deferred"}}


def write(path, content):
    text = json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content)
    path.write_text(text, encoding="utf-8")
    return path


# -- whole launches ----------------------------------------------------------------------------------------------------


@pytest.fixture
def started_in_a_state_of_its_own():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("started_in_a_state_of_its_own")
def test_slideformer_launch_streams_without_the_hook(run, tmp_path, capsys):
    """`accelerate launch` with the hook is tested from a wheel."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    runpy.run_path(str(script), run_name="__main__")  # under plain Accelerate
    plain = json.loads(capsys.readouterr().out)
    assert plain["h2d_bytes"] == 0
    config = write(tmp_path / "slideformer.json", CONFIG | STREAM)
    result = run(
        *("-m", "hf_slideformer.cli", "launch", "--config_file", config, script, "--config_file", "x"),
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert result.returncode == 0, result.stderr
    trained = json.loads(result.stdout.splitlines()[-1])
    assert trained["h2d_bytes"] > 0
    assert trained["argv"] == ["--config_file", "x"]
    torch.testing.assert_close(
        torch.tensor(trained["losses"]), torch.tensor(plain["losses"]), rtol=1e-5, atol=0
    )


def test_a_section_is_not_ignored_without_the_hook(tmp_path):
    config = write(tmp_path / "slideformer.yaml", CONFIG | STREAM)
    with pytest.raises(ValueError, match="slideformer_config"):
        accelerate_launch.load_config_from_file(str(config))


SAY = "import json, os, sys; print(json.dumps({name: os.environ.get(name) for name in sys.argv[1:]}))"


def test_default_file_and_accelerates_module(run, tmp_path):
    (tmp_path / "accelerate").mkdir()
    write(tmp_path / "accelerate" / "default_config.yaml", CONFIG | STREAM)
    (tmp_path / "say.py").write_text(SAY)
    environment = {"HF_HOME": str(tmp_path)}
    result = run("-m", "accelerate.commands.launch", "-m", "say", CONFIG_VARIABLE, **environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(json.loads(result.stdout)[CONFIG_VARIABLE]) == STREAM["slideformer_config"]
    assert "nothing was streamed" in result.stderr


@pytest.mark.slow
def test_without_a_section_nothing_changes(accelerate, tmp_path):
    """What `accelerate config` and `accelerate launch` print, write and start, with the hook and without it."""
    (tmp_path / "say.py").write_text(
        "import json, os, sys\nprint(json.dumps([sys.argv, __name__, __file__, sys.path[0], sys.meta_path.__len__(), "
        "sorted(sys.modules), {k: v for k, v in os.environ.items() if k != 'TORCH_DEVICE_BACKEND_AUTOLOAD'}]))"
    )
    config = write(tmp_path / "plain.yaml", CONFIG)
    results, written = [], []
    for hook in ("1", "0"):
        lines = (
            ["config", "default", "--config_file", "written.yaml"],
            ["launch", "--config_file", config, "say.py", "--x"],
        )
        results.append(accelerate(*lines, TORCH_DEVICE_BACKEND_AUTOLOAD=hook))
        written.append((tmp_path / "written.yaml").read_text())
        (tmp_path / "written.yaml").unlink()
    ours, theirs = results
    assert ours.returncode == 0, ours.stderr
    assert (ours.stdout, ours.stderr) == (theirs.stdout, theirs.stderr)
    assert "say.py" in ours.stdout
    assert written[0] == written[1]


# -- the launcher, with the start of the script replaced ---------------------------------------------------------------


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Scripts that Accelerate's launcher was made to start; its module is put back afterwards."""
    scripts = []
    for name in ("load_config_from_file", "default_config_file", *launch._REFUSED_LAUNCHERS):
        monkeypatch.setattr(accelerate_launch, name, getattr(accelerate_launch, name))
    monkeypatch.setattr(accelerate_launch, "simple_launcher", scripts.append)
    monkeypatch.setattr(accelerate_launch, "default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setattr("accelerate.commands.config.default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setenv(CONFIG_VARIABLE, "unset")
    return scripts


def by_accelerate(*arguments):
    """`accelerate launch` in a process with the hook."""
    launch.accept_section(accelerate_launch)
    accelerate_launch.launch_command(
        accelerate_launch.launch_command_parser().parse_args([*map(str, arguments)])
    )


def by_slideformer(*arguments):
    assert cli.main(["launch", *map(str, arguments)]) == 0


LAUNCHERS = pytest.mark.parametrize("start", [by_accelerate, by_slideformer])


@LAUNCHERS
@pytest.mark.parametrize("name", ["slideformer.yaml", "slideformer.json", "no-ending"])
@pytest.mark.parametrize("section", [{"trace_steps": 2}, {}, None])
def test_settings_reach_the_script(start, name, section, started, tmp_path):
    config = write(tmp_path / name, CONFIG | {"slideformer_config": section})
    start("--config_file", config, "train.py", "--lr", "1")
    (args,) = started
    assert args.module is True and args.training_script == "hf_slideformer.launch"
    assert args.training_script_args == ["train.py", "--lr", "1"]
    assert json.loads(os.environ[CONFIG_VARIABLE]) == (section or {})


def test_slideformer_launch_needs_no_section(started):
    by_slideformer("--cpu", "-m", "package.train")
    (args,) = started
    assert args.training_script_args == ["-m", "package.train"]
    assert args.num_processes == 1  # and not one for each GPU
    assert os.environ[CONFIG_VARIABLE] == "{}"


def test_without_a_section_accelerates_launcher_is_left_alone(started, tmp_path):
    originals = {name: getattr(accelerate_launch, name) for name in ("simple_launcher", "multi_gpu_launcher")}
    by_accelerate("--config_file", write(tmp_path / "plain.yaml", CONFIG), "train.py")
    assert [args.training_script for args in started] == ["train.py"]
    assert os.environ[CONFIG_VARIABLE] == "unset"
    assert all(getattr(accelerate_launch, name) is value for name, value in originals.items())


REFUSED = {
    "processes": ({}, ["--num_processes", "2"], "one process, this launch has 2"),
    "processes_in_the_file": ({"num_processes": 2, "use_cpu": False}, [], "one process, this launch has 2"),
    "machines": ({"num_machines": 2, "num_processes": 2}, [], "on 2 machine"),
    "multi_gpu": (
        {"distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": False},
        [],
        "several processes",
    ),
    "fsdp": ({"distributed_type": "FSDP", "fsdp_config": {}, "use_cpu": False}, [], "FSDP"),
    "deepspeed": (
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}, "use_cpu": False},
        [],
        "DeepSpeed",
    ),
    "fsdp_on_the_cpu": ({"distributed_type": "FSDP", "fsdp_config": {}}, ["--cpu"], "asks for FSDP"),
    "megatron": (
        {"distributed_type": "MEGATRON_LM", "megatron_lm_config": {}, "use_cpu": False},
        [],
        "Megatron",
    ),
    "mpi": ({"mpirun_config": {"mpirun_hostfile": "hosts"}}, [], "mpirun"),
    "fp16": ({"mixed_precision": "fp16"}, [], "fp16"),
    "fp8": ({}, ["--mixed_precision", "fp8"], "fp8"),
    "compiled": ({"dynamo_backend": "INDUCTOR"}, [], "inductor"),
    "no_python": ({}, ["--no_python"], "--no_python"),
    "unknown_key": ({"slideformer_config": {"gpu_memry": "1GiB"}}, [], "did you mean 'gpu_memory'"),
    "value": ({"slideformer_config": {"placement": "streamed"}}, [], "'auto', 'stream'"),
    "no_mapping": ({"slideformer_config": ["stream"]}, [], "must be a mapping of settings, got ['stream']"),
    "a_text": ({"slideformer_config": "stream"}, [], "must be a mapping of settings, got 'stream'"),
}


@LAUNCHERS
@pytest.mark.parametrize("case", REFUSED)
def test_refused(start, case, started, tmp_path, capsys):
    changes, flags, message = REFUSED[case]
    config = write(tmp_path / "slideformer.yaml", CONFIG | STREAM | changes)
    with pytest.raises(SystemExit) as ended:
        start("--config_file", config, *flags, "train.py")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("slideformer: error: ") and error.count("\n") == 1
    assert message in error
    assert not started


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"- 1", b""])
def test_unreadable_file(content, started, tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert cli.main(["launch", "--config_file", str(path), "train.py"]) == 2
    assert str(path) in capsys.readouterr().err
    assert not started


def test_missing_file(started, tmp_path, capsys):
    assert cli.main(["launch", "--config_file", str(tmp_path / "missing.yaml"), "train.py"]) == 2
    assert "missing.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["slideformer.yaml", "slideformer.json"])
def test_accelerate_reads_the_rest_as_it_was_written(name, tmp_path):
    rest = {"number": 0.00001, "text": "no", "emoji": "\U0001f600"}
    text = "number: 1.0e-05\ntext: 'no'\nemoji: \U0001f600\nday: 2026-01-31\nslideformer_config: {}\n"
    if name.endswith(".json"):
        text = json.dumps(rest | {"slideformer_config": {}})
    else:
        rest["day"] = datetime.date(2026, 1, 31)
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    module = SimpleNamespace(load_config_from_file=launch.read_configuration, default_config_file=None)
    launch.accept_section(module)
    assert module.load_config_from_file(str(path)) == rest


def test_refused_without_a_file(started, capsys):
    for flags in (["--use_fsdp"], ["--multi_gpu"], ["--multi_gpu", "--num_processes", "2"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["launch", *flags, "train.py"])
        assert ended.value.code == 2
        *_, error = capsys.readouterr().err.splitlines()
        assert error.startswith("slideformer: error: slideformer launch: ") and "several processes" in error
    assert not started


def test_options_that_accelerate_refuses(started, tmp_path, capsys):
    assert cli.main(["launch", "--cpu", "--multi_gpu", "train.py"]) == 2
    assert "slideformer: error: You can only use one of `--cpu`, `--multi_gpu`" in capsys.readouterr().err
    config = write(tmp_path / "slideformer.yaml", STREAM)
    assert cli.main(["launch", "--config_file", str(config), "train.py"]) == 2
    assert "distributed_type" in capsys.readouterr().err
    assert not started


def test_accelerates_error_names_the_users_file(started, tmp_path):
    config = write(tmp_path / "slideformer.yaml", CONFIG | STREAM | {"num_procesess": 1})
    with pytest.raises(ValueError, match="num_procesess") as error:
        by_accelerate("--config_file", config, "train.py")
    assert str(config) in str(error.value)


def test_exit_code_of_the_script(started, monkeypatch, tmp_path):
    monkeypatch.setattr(accelerate_launch, "simple_launcher", SIMPLE_LAUNCHER)
    (tmp_path / "fails.py").write_text("import sys; sys.exit(7)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))))
    assert cli.main(["launch", "--cpu", str(tmp_path / "fails.py")]) == 7


# -- the script's process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_module", [False, True], ids=["script", "module"])
def test_a_script_sees_what_it_would_without_us(as_module, run, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "neighbour.py").write_text("NAME = 'neighbour'\n")
    (folder / "__init__.py").write_text("")
    (folder / "script.py").write_text(
        "import json, os, pickle, sys\n"
        f"from {'folder.' if as_module else ''}neighbour import NAME\n"
        "class Mine: pass\n"
        "assert type(pickle.loads(pickle.dumps(Mine()))) is Mine\n"
        "assert not {'torch', 'accelerate', 'transformers'} & set(sys.modules)\n"
        "print(json.dumps([NAME, __name__, __file__, os.path.abspath(sys.argv[0]), sys.argv[1:], sys.path[0]]))\n"
    )
    script = ["-m", "folder.script"] if as_module else ["folder/script.py"]
    ours, theirs = run("-m", "hf_slideformer.launch", *script, "--x", "1"), run(*script, "--x", "1")
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == theirs.stdout
    assert theirs.stdout.startswith('["neighbour", "__main__"')


def test_a_script_that_is_not_there(run):
    result = run("-m", "hf_slideformer.launch", "missing.py")
    assert result.returncode == 2
    assert result.stderr == "slideformer: error: there is no script 'missing.py'; -m runs a module\n"


@pytest.mark.parametrize(
    ("end", "code", "warned"),
    [("", 0, True), ("exit()", 0, True), ("exit(0)", 0, True), ("exit(3)", 3, False)],
)
def test_a_script_that_never_streams_is_told_so(end, code, warned, run, tmp_path):
    (tmp_path / "script.py").write_text(f"from sys import exit\n{end}\n")
    result = run("-m", "hf_slideformer.launch", "script.py")
    assert result.returncode == code
    assert ("nothing was streamed" in result.stderr) == warned


def test_the_safe_path_of_a_script_is_left_alone(run, tmp_path):
    (tmp_path / "script.py").write_text("import sys; print(sys.path)")
    ours, theirs = (
        run(*runner, "script.py", PYTHONSAFEPATH="1") for runner in (["-m", "hf_slideformer.launch"], [])
    )
    assert (ours.returncode, ours.stdout) == (0, theirs.stdout), ours.stderr


def test_workers_that_are_spawned(run, tmp_path):
    (tmp_path / "script.py").write_text(
        "import multiprocessing\n"
        "def double(x): return 2 * x\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(double, [1, 2]))\n"
    )
    result = run("-m", "hf_slideformer.launch", "script.py")
    assert result.stdout == "[2, 4]\n", result.stderr


def test_binding_leaves_the_rest_of_accelerate(monkeypatch):
    names = [name for name in vars(accelerate) if not name.startswith("_")]
    copy = SimpleNamespace(**{name: getattr(accelerate, name) for name in names}, __name__="accelerate")
    launch.bind_accelerator(copy)
    assert set(copy.__all__) == set(names)
    assert copy.__getattr__("Accelerator").__name__ == "SlideAccelerator"
    with pytest.raises(AttributeError, match="'accelerate' has no attribute 'Accelerators'"):
        copy.__getattr__("Accelerators")


def test_plain_trainer_is_refused(monkeypatch, tmp_path):
    trainer_class = transformers.trainer.Trainer
    create = trainer_class.create_accelerator_and_postprocess
    monkeypatch.setattr(trainer_class, "create_accelerator_and_postprocess", create)
    launch.refuse_plain_trainer(transformers.trainer)
    with pytest.raises(UnsupportedModelError, match="use SlideTrainer"):
        runs.make(trainer_class, runs.llama(), tmp_path)
    monkeypatch.setenv(CONFIG_VARIABLE, '{"trace_steps": 2}')
    trainer = runs.make(SlideTrainer, runs.llama(), tmp_path)
    assert trainer.accelerator.slide_setup.config.trace_steps == 2


def test_modules_are_seen_once_imported(run, tmp_path):
    (tmp_path / "later.py").write_text("VALUE = 1\n")
    program = (
        "import sys, importlib.util\nfrom hf_slideformer.launch import after_import\nseen = []\n"
        "finders = list(sys.meta_path)\n"
        "after_import('later', lambda module: seen.append(module.VALUE))\n"
        "importlib.util.find_spec('later')  # as those do who want to know whether it is there\n"
        "assert not seen\nimport later\nassert seen == [1] and sys.meta_path == finders\n"
        "after_import('later', lambda module: seen.append(2))\nassert seen == [1, 2]\n"
        "assert importlib.util.find_spec('later') and importlib.reload(later) and seen == [1, 2]\n"
    )
    result = run("-c", program)
    assert result.returncode == 0, result.stderr


# -- slideformer config ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mine.yaml", "mine.json"])
def test_config_by_flags(name, tmp_path, started):
    path = tmp_path / "new" / name
    flags = ["--gpu-memory", "24GiB", "--seq-len", "2048", "--mixed_precision", "no", "--cpu"]
    assert cli.main(["config", "--config_file", str(path), *flags]) == 0
    content = launch.read_configuration(path)
    assert content["slideformer_config"] == {"gpu_memory": "24GiB", "seq_len": 2048}
    assert (content["mixed_precision"], content["use_cpu"], content["num_processes"]) == ("no", True, 1)
    by_accelerate("--config_file", path, "train.py")
    assert json.loads(os.environ[CONFIG_VARIABLE]) == content["slideformer_config"]


def test_config_by_questions(tmp_path, monkeypatch, capsys):
    answers = iter(["", "lots", "24GiB", "", "/mnt/nvme", "8bit"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    path = tmp_path / "mine.yaml"
    assert cli.main(["config", "--config_file", str(path)]) == 0
    content = launch.read_configuration(path)
    assert content["mixed_precision"] == "bf16"
    assert content["slideformer_config"] == {
        "gpu_memory": "24GiB",
        "nvme_dir": "/mnt/nvme",
        "optimizer_states": "8bit",
    }
    assert "'lots' is not a size" in capsys.readouterr().out


def test_config_without_answers(tmp_path, monkeypatch, capsys):
    def end(question):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert cli.main(["config", "--config_file", str(tmp_path / "mine.yaml")]) == 2
    assert "--defaults" in capsys.readouterr().err


def test_config_replaces_only_when_told(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("kept: true\n")
    assert cli.main(["config", "--config_file", str(path), "--defaults"]) == 2
    assert path.read_text() == "kept: true\n"
    assert cli.main(["config", "--config_file", str(path), "--defaults", "--force"]) == 0
    assert launch.read_configuration(path)["slideformer_config"] == {}


def test_config_refuses_what_cannot_be_used(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    for flags in (["--seq-len", "long"], ["--placement", "streamed"], ["--gpu-memory", "-1"]):
        with_flags = ["config", "--config_file", str(path), f"{flags[0]}={flags[1]}"]
        assert cli.main(with_flags) == 2
        assert flags[1] in capsys.readouterr().err
    assert not path.exists()


def test_default_place_is_accelerates(monkeypatch, tmp_path):
    place = tmp_path / "accelerate" / "default_config.yaml"
    monkeypatch.setattr("accelerate.commands.config.config_args.default_yaml_config_file", str(place))
    assert cli.main(["config", "--defaults"]) == 0
    assert "slideformer_config" in launch.read_configuration(place)


def test_check_launch_takes_what_accelerate_launch_gives():
    launch.check_launch(argparse.Namespace(num_processes=1, num_machines=None, mixed_precision="bf16"))
