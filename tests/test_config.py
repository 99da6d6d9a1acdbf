"""Settings: config arguments, the border to ml_collections, and what `check` refuses."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from scale_sae_jax.config import (
    CHOICES,
    ActivationsConfig,
    Config,
    LMConfig,
    OptimConfig,
    SAEConfig,
    TextConfig,
    check,
    from_config_dict,
    parse_arg,
    to_config_dict,
)
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae.presets import PRESETS, preset

DEFAULTS = {"l0": 32, "rate": 0.5, "preset": "paper", "bos": True}
VALID = Config(lm=LMConfig(path="model"), text=TextConfig(path="text.jsonl"))
CONFIG_FILES = sorted(
    path
    for path in (Path(__file__).parent.parent / "configs").glob("*.py")
    if path.stem != "__init__"
)


def changed(path, value):
    """VALID with one setting replaced: changed('sae.k', 3)."""
    *section, name = path.split(".")
    if not section:
        return dataclasses.replace(VALID, **{name: value})
    inner = dataclasses.replace(getattr(VALID, section[0]), **{name: value})
    return dataclasses.replace(VALID, **{section[0]: inner})


def refusal(action):
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# Arguments of a config file


def test_arguments_are_typed_by_their_defaults():
    arg = parse_arg("l0=8,rate=1,preset=switch,bos=False", **DEFAULTS)
    assert arg.to_dict() == {"l0": 8, "rate": 1.0, "preset": "switch", "bos": False}
    assert [type(arg[name]) for name in DEFAULTS] == [int, float, str, bool]
    for text, value in (("true", True), ("1", True), ("FALSE", False), ("0", False)):
        assert parse_arg(f"bos={text}", **DEFAULTS).bos is value


@pytest.mark.parametrize("arg", ["", None])
def test_no_argument_gives_the_defaults(arg):
    assert parse_arg(arg, **DEFAULTS).to_dict() == DEFAULTS


def test_a_value_may_hold_an_equals_sign():
    assert parse_arg("preset=a=b", **DEFAULTS).preset == "a=b"


@pytest.mark.parametrize(
    ("arg", "parts"),
    [
        ("nonsense=1", ["nonsense", "l0, rate, preset, bos"]),
        ("l0=8,l1=2", ["'l1'"]),
        ("l0", ["'l0'", "no '='"]),
        ("l0=", ["l0=", "int"]),
        ("l0=3.5", ["l0=3.5", "int"]),
        ("l0=many", ["l0=many", "int"]),
        ("rate=fast", ["rate=fast", "float"]),
        ("bos=maybe", ["bos=maybe", "bool"]),
    ],
)
def test_bad_arguments_are_named(arg, parts):
    message = refusal(lambda: parse_arg(arg, **DEFAULTS))
    assert all(part in message for part in parts)


# The border to ml_collections


def test_round_trip_keeps_every_setting():
    config = changed("sae.gate", "renorm")
    settings = to_config_dict(config)
    assert isinstance(settings, ConfigDict)
    assert from_config_dict(settings) == config
    assert from_config_dict(dataclasses.asdict(config)) == config


def test_overrides_reach_the_config_and_missing_settings_keep_their_defaults():
    settings = to_config_dict(VALID)
    settings.optim.lr = 0.25
    assert from_config_dict(settings) == changed("optim.lr", 0.25)
    sparse = {"lm": {"path": "model"}, "text": {"path": "text.jsonl"}}
    assert from_config_dict(sparse) == VALID


def test_an_integer_serves_as_a_float_but_not_the_other_way_round():
    settings = dataclasses.asdict(VALID)
    settings["optim"]["lr"] = 1
    lr = from_config_dict(settings).optim.lr
    assert lr == 1.0 and type(lr) is float


@pytest.mark.parametrize(
    ("section", "name", "value", "parts"),
    [
        (None, "foo", 1, ["config.foo", "unknown"]),
        ("sae", "foo", 1, ["config.sae.foo", "unknown"]),
        (None, "steps", "abc", ["config.steps", "'abc'", "int"]),
        (None, "steps", 1.5, ["config.steps", "1.5", "int"]),
        (None, "steps", True, ["config.steps", "True", "int"]),
        (None, "wandb", 1, ["config.wandb", "bool"]),
        ("optim", "lr", True, ["config.optim.lr", "float"]),
        ("optim", "lr", "1e-3", ["config.optim.lr", "float"]),
        ("text", "path", None, ["config.text.path", "str"]),
        (None, "sae", 3, ["config.sae", "3"]),
    ],
)
def test_unknown_and_mistyped_settings_are_named(section, name, value, parts):
    settings = dataclasses.asdict(VALID)
    (settings[section] if section else settings)[name] = value
    message = refusal(lambda: from_config_dict(settings))
    assert all(part in message for part in parts)


# Contradictions


def test_the_valid_config_is_valid():
    check(VALID)


@pytest.mark.parametrize("path", CHOICES)
def test_an_unknown_choice_is_refused_with_the_choices(path):
    message = refusal(lambda: check(changed(path, "nonsense")))
    assert f"config.{path}" in message
    assert all((choice or "''") in message for choice in CHOICES[path])
    for choice in CHOICES[path]:
        check(changed(path, choice))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("log_every", 0),
        ("keep_checkpoints", 0),
        ("checkpoint_every", -1),
        ("optim.lr", -1e-3),
        ("optim.clip", -1.0),
        ("optim.warmup", -0.1),
        ("optim.decay", 1.1),
        ("eval.tokens", 0),
        ("optim.b1", 1.5),
        ("optim.b2", -0.1),
        ("optim.eps", -1.0),
        ("sae.load_balance", -3.0),
        ("sae.auxk_weight", -1.0),
        ("activations.max_norm_ratio", -3.0),
        ("eval.bootstrap", -1),
        ("eval.seed", -1),
        ("sae.dead_after", 0),
        ("sae.dead_after", 3_000_000_000),
        ("sae.auxk_latents", -1),
        ("sae.latents", 2**33),
        ("seed", 2**32),
        ("seed", -(2**31) - 1),
        ("text.max_documents", -1),
        ("sae.latents", 0),
        ("sae.experts", 0),
        ("sae.active", 0),
        ("sae.k", 0),
        ("sae.orthogonality_chunk", 1),
        ("lm.path", ""),
        ("lm.layer", -1),
        ("lm.rows_per_batch", 0),
        ("text.path", ""),
        ("text.context", 1),
        ("text.heldout_fraction", 0.0),
        ("text.heldout_fraction", 1.0),
        ("activations.tokens", -1),
        ("activations.shard_rows", 0),
    ],
)
def test_a_value_out_of_range_is_named(path, value):
    message = refusal(lambda: check(changed(path, value)))
    section, _, name = path.rpartition(".")
    assert f"config.{section}" in message and re.search(rf"\b{name}\b", message)


@pytest.mark.parametrize("path", ["optim.lr", "sae.load_balance", "text.heldout_fraction"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_must_be_finite(path, value):
    message = refusal(lambda: check(changed(path, value)))
    assert message == f"config.{path} = {value} must be a finite number"


def sae_refusal(**settings):
    return refusal(lambda: check(dataclasses.replace(VALID, sae=SAEConfig(**settings))))


def test_sizes_of_the_autoencoder_that_contradict_each_other():
    message = sae_refusal(latents=100, experts=8)
    assert "config.sae.latents = 100" in message and "take 96 latents" in message
    message = sae_refusal(latents=64, experts=4, active=5)
    assert "config.sae.active = 5" in message and "experts = 4" in message
    message = sae_refusal(latents=64, experts=4, active=2, k=33)
    assert "config.sae.k (l0) = 33" in message and "32 latents" in message
    message = sae_refusal(active=2, k=33, topk_scope="expert")
    assert "config.sae.topk_scope" in message and "k (l0) = 33" in message
    check(dataclasses.replace(VALID, sae=SAEConfig(latents=64, experts=4, active=2, k=32)))


def test_text_held_out_elsewhere_needs_no_fraction():
    text = TextConfig(path="text.jsonl", heldout_path="other.jsonl", heldout_fraction=0.0)
    check(dataclasses.replace(VALID, text=text))


def test_an_array_needs_no_model_or_text_but_a_fraction():
    array = ActivationsConfig(path="acts.npy")
    check(Config(activations=array))
    text = TextConfig(heldout_fraction=0.0)
    message = refusal(lambda: check(Config(activations=array, text=text)))
    assert "config.text.heldout_fraction" in message
    for wrong in ({"buffer": 4}, {"max_norm_ratio": -1.0}):
        unfit = dataclasses.replace(array, **wrong)
        message = refusal(lambda unfit=unfit: check(Config(activations=unfit)))
        assert all(f"config.activations.{name}" in message for name in wrong)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimConfig().lr = 1.0


# Presets and the files of configs/


@pytest.mark.parametrize("name", PRESETS)
def test_presets_pass_the_check_and_are_what_they_say(name):
    config = preset(name, latents=64, experts=4, active=0, k=4)
    check(dataclasses.replace(VALID, sae=config))
    assert config.active == (1 if name == "switch" else 2)
    assert preset(name, latents=64, experts=4, active=3, k=4).active == 3
    own = {field: getattr(config, field) for field in PRESETS[name]}
    assert own == PRESETS[name]


def test_an_unknown_preset_is_refused_with_the_names():
    message = refusal(lambda: preset("papers", latents=64, experts=4, active=0, k=4))
    assert "'papers'" in message and all(name in message for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_an_unknown_match_is_refused_with_the_choices(name):
    message = refusal(lambda: preset(name, latents=64, experts=4, active=0, k=4, match="foo"))
    assert message.startswith("match=foo is unknown") and "active, width, time" in message


def config_file(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", PRESETS)
def test_every_config_file_takes_the_common_arguments(path, name):
    get_config = config_file(path)
    source = ",path=x.npy" if path.stem == "array" else ""
    arg = f"l0=4,experts=4,active=3,latents=64,preset={name},seed=7{source}"
    config = from_config_dict(get_config(arg))
    expected = preset(name, latents=64, experts=4, active=3, k=4)
    assert config.sae == expected and config.seed == 7


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_config_file_stands_without_arguments_and_names_unknown_ones(path):
    get_config = config_file(path)
    from_config_dict(get_config("path=x.npy" if path.stem == "array" else ""))
    assert "'nonsense'" in refusal(lambda: get_config("nonsense=1"))


def test_the_config_of_an_array_needs_its_path():
    get_config = config_file(Path(__file__).parent.parent / "configs" / "array.py")
    for arg in ("", "path=acts.bin"):
        assert "path=FILE.npy" in refusal(lambda arg=arg: get_config(arg))
