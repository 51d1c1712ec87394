"""`SlideConfig`: sizes, sources and errors."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from hf_slideformer import SlideConfig
from hf_slideformer.config import parse_bytes
from hf_slideformer.errors import ConfigError

SIZES = {
    1: 1,
    2**40: 2**40,
    "4096": 4096,
    "24GiB": 24 * 2**30,
    "24gib": 24 * 2**30,
    " 1.5 TiB ": 3 * 2**39,
    "80GB": 80 * 10**9,
    "0.5kB": 500,
    ".5MiB": 2**19,
    "7 B": 7,
    "1.9999B": 1,
    "2TB": 2 * 10**12,
    "3KiB": 3072,
}


@pytest.mark.parametrize("text", SIZES, ids=repr)
def test_sizes(text):
    size = parse_bytes(text)
    assert size == SIZES[text]
    assert type(size) is int


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "24 GiBs", "24G", "1e9", "-1GiB", "1,5GiB", "24GiB free", "0x10", "nan", True, None]
    + [pytest.param("9" * 400 + "B", id="beyond a float")],
)
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="'24GiB'"):
        parse_bytes(text)


@pytest.mark.parametrize("text", [0, -5, "0", "0GiB", "0.1B"])
def test_sizes_are_positive(text):
    with pytest.raises(ConfigError, match=r"must be positive, got .*" + str(text)):
        parse_bytes(text)


def test_sizes_become_bytes_under_their_names():
    config = SlideConfig(gpu_memory="24GiB", cpu_memory="256 GB", pinned_memory=4096)
    assert (config.gpu_memory, config.cpu_memory, config.pinned_memory) == (24 * 2**30, 256 * 10**9, 4096)
    with pytest.raises(ConfigError, match=r"^pinned_memory: 'lots' is not a size"):
        SlideConfig(pinned_memory="lots")


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SlideConfig().update = "deferred"


def test_sources(tmp_path):
    given = {"cpu_memory": "8GiB", "update": "deferred", "cpu_threads": 3}
    expected = SlideConfig(**given)
    assert expected != SlideConfig()
    plain, nested = tmp_path / "plain.yaml", tmp_path / "accelerate.yaml"
    text = "cpu_memory: 8GiB\nupdate: deferred\ncpu_threads: 3\n"
    plain.write_text(text)
    nested.write_text("mixed_precision: bf16\nslideformer_config:\n  " + text.replace("\n", "\n  "))
    for source in (given, expected, plain, str(plain), nested):
        assert SlideConfig.of(source) == expected
    assert SlideConfig.of(expected) is expected
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    (tmp_path / "section.yaml").write_text("slideformer_config:\n")
    for source in (None, {}, tmp_path / "empty.yaml", tmp_path / "section.yaml"):
        assert SlideConfig.of(source) == SlideConfig()


@pytest.mark.parametrize("source", [3, ["update"], object()], ids=["number", "list", "object"])
def test_other_sources_are_refused(source):
    with pytest.raises(ConfigError, match=rf"dict, YAML path or None, got {type(source).__name__}"):
        SlideConfig.of(source)


FILES = {
    "missing": (None, "cannot read slide_config from"),
    "broken": ("update: [", "cannot read slide_config from"),
    "binary": (b"\xff\xfe\x00", "cannot read slide_config from"),
    "list": ("- update\n", "holds a list, not a mapping"),
    "section": ("slideformer_config: deferred\n", "holds a str, not a mapping"),
    "key": ("updates: deferred\n", "did you mean 'update'"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files_are_named(tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / "slide.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        SlideConfig.of(path)
    assert str(path) in str(caught.value)


def test_unknown_keys():
    with pytest.raises(ConfigError, match=r"unknown key 'cpu_memroy' .*; did you mean 'cpu_memory'\?"):
        SlideConfig.of({"cpu_memroy": "1GiB"})
    with pytest.raises(ConfigError, match=r"unknown key 'zzz' .*; valid keys: gpu_memory, .*trace_steps"):
        SlideConfig.of({"zzz": 1})
    with pytest.raises(ConfigError, match="unknown key 3"):
        SlideConfig.of({3: 1})


BAD_VALUES = {
    "placement": ("everywhere", r"'everywhere' is not one of 'auto', 'stream'"),
    "update": ("never", r"'auto', 'deferred', 'overlapped'"),
    "cpu_threads": (0, "positive integer or None, got 0"),
    "trace_steps": (-1, "non-negative integer, got -1"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values(name):
    value, message = BAD_VALUES[name]
    with pytest.raises(ConfigError, match=message) as caught:
        SlideConfig(**{name: value})
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("cpu_threads", True), ("cpu_threads", 1.5), ("trace_steps", "2"), ("trace_steps", True)],
)
def test_bad_types(name, value):
    with pytest.raises(ConfigError, match=rf"{name} must be"):
        SlideConfig(**{name: value})


def test_directories_for_state_on_disk(tmp_path):
    path = tmp_path / "state"
    for given in (path, str(path), [path], (str(path),), [str(path)]):
        config = SlideConfig(nvme_dir=given)
        assert config.nvme_dir == config.nvme_dirs == (str(path),)
        assert not path.exists()  # it may be a directory of another machine
    two = SlideConfig(nvme_dir=f"/a{os.pathsep}/b", nvme_memory="2TB")
    assert two.nvme_dirs == ("/a", "/b") and two.nvme_memory == 2 * 10**12
    assert two == SlideConfig(nvme_dir=["/a", Path("/b")], nvme_memory=2 * 10**12)
    # In a list, and as a path, the separator is part of a name.
    assert SlideConfig(nvme_dir=[f"/a{os.pathsep}b"]).nvme_dirs == (f"/a{os.pathsep}b",)
    assert SlideConfig(nvme_dir=Path(f"/a{os.pathsep}b")).nvme_dirs == (f"/a{os.pathsep}b",)
    assert SlideConfig().nvme_dirs == ()


def test_a_home_directory_is_that_of_the_machine_that_trains(monkeypatch):
    config = SlideConfig(nvme_dir="~/state")
    assert config.nvme_dir == ("~/state",)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert config.nvme_dirs == ("/home/somebody/state",)


def test_directories_in_yaml_and_json(tmp_path):
    path = tmp_path / "slide.yaml"
    path.write_text("nvme_dir: [/a, /b]\nnvme_memory: 1TiB\n")
    expected = SlideConfig(nvme_dir=["/a", "/b"], nvme_memory=2**40)
    assert SlideConfig.of(path) == expected
    path.write_text(f"nvme_dir: '/a{os.pathsep}/b'\nnvme_memory: 1TiB\n")
    assert SlideConfig.of(path) == expected
    assert SlideConfig.of(json.loads(json.dumps(dataclasses.asdict(expected)))) == expected


@pytest.mark.parametrize(
    "given", ["", " ", [], (), ["/a", ""], f"/a{os.pathsep}", 3, b"/a", [b"/a"], {"/a": 1}, True]
)
def test_what_names_no_directories(given):
    with pytest.raises(ConfigError, match="nvme_dir must be a directory or a list of directories, got"):
        SlideConfig(nvme_dir=given)


def test_a_directory_named_twice():
    with pytest.raises(ConfigError, match=r"nvme_dir names a directory twice: '/a', '/a/'; name each once"):
        SlideConfig(nvme_dir=["/a", "/a/"])


def test_a_limit_for_no_disk():
    with pytest.raises(ConfigError, match=r"nvme_memory .* no nvme_dir; name a directory"):
        SlideConfig(nvme_memory="1TB")
    with pytest.raises(ConfigError, match=r"^nvme_memory: 'much' is not a size"):
        SlideConfig(nvme_dir="/a", nvme_memory="much")
