"""Settings: ranges, the paper's values, config.json, and what may differ on a resume."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any, get_args

import pytest

from ckd._json import sealed
from ckd.train import Config, ConfigError
from ckd.train.config import MAY_DIFFER_ON_RESUME, MethodName, differences
from ckd.train.methods import METHODS


def test_defaults_are_valid():
    Config().check()
    Config(paper_compat=True).check()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"method": "embed-dk"}, "unknown method 'embed-dk'; --method takes, nearest first: embed"),
        ({"method": None}, "unknown method None; --method takes"),
        ({"targets": "centroid"}, "--targets takes, nearest first: centroids, samples"),
        ({"amp": 16}, "unknown amp 16; --amp takes, nearest first: "),
    ],
)
def test_a_value_that_is_no_choice_names_the_flag_and_the_choices(
    setting: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**setting).check()
    assert says in str(caught.value)


def test_every_method_can_be_chosen():
    assert get_args(MethodName) == tuple(METHODS)


def test_paper_compat_fills_in_what_was_left_at_its_default():
    config = Config(paper_compat=True, epochs=3)
    assert config.epochs == 3
    assert (config.logit_scale, config.learn_logit_scale) == (1.0, False)
    assert (config.centroids_per_class, config.crop_padding, config.flip) == (100, 0, True)
    published = (config.batch_size, config.lr, config.weight_decay, config.mix)
    assert published == (64, 1e-4, 0.1, {"contrastive": 0.5})
    assert Config(paper_compat=True).epochs == 200
    assert Config(paper_compat=True).targets == "centroids"
    assert Config(paper_compat=True, targets="samples").targets == "samples"


def test_survives_config_json(tmp_path):
    config = Config(paper_compat=True, data="some folder", lr=1e-4 / 3, clip_norm=1.0)
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"lr": 1', '{"lr": 1}'])
def test_a_damaged_config_json_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        Config.load(tmp_path / "config.json")


def test_a_field_of_another_version_is_named(tmp_path):
    settings = Config().to_dict() | {"momentum": 0.9}
    (tmp_path / "config.json").write_bytes(sealed(settings))
    with pytest.raises(ConfigError, match=r"another version.*momentum"):
        Config.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": None}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"epochs": 10**400}, "--epochs must be at least 1"),
        ({"lr": math.nan}, "--lr must be above 0"),
        ({"seed": 2**63}, "--seed must be at least 0 and at most 9,223,372,036,854,775,807"),
        ({"image_size": 10**9}, "--image-size must be at least 1 and at most 4,096"),
        ({"label_fraction": 1.5}, "--label-fraction must be at least 0 and at most 1"),
        ({"flip": 1}, "flip"),
        ({"out": ["x"]}, "out"),
        ({"method": []}, "method"),
        ({"method": "embed-dk"}, "unknown method"),
        ({"pool": "no"}, "unknown pool"),
        ({"data": "a\0b"}, "NUL"),
    ],
)
def test_values_of_another_kind_are_named(tmp_path, changes, says):
    (tmp_path / "config.json").write_bytes(sealed(Config().to_dict() | changes))
    with pytest.raises(ConfigError, match=rf"config\.json.*{says}"):
        Config.load(tmp_path / "config.json")


def test_every_flipped_byte_of_a_config_is_noticed(tmp_path):
    Config().save(file := tmp_path / "config.json")
    data = file.read_bytes()
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(
            ConfigError, match=r"config\.json (is damaged|was written by another version)"
        ):
            Config.load(file)


def test_differences_name_fields_with_both_values():
    old = Config()
    new = replace(old, lr=0.5, seed=3, device="cpu", workers=7, out="elsewhere")
    assert differences(old, new) == {"lr": (1e-4, 0.5), "seed": (0, 3)}


def test_every_field_that_may_differ_exists():
    assert {field.name for field in dataclasses.fields(Config)} >= MAY_DIFFER_ON_RESUME


def test_run_folders_of_different_methods_and_seeds_differ():
    folders = {Config(method=m, seed=s).folder for m in ("plain", "embed-kd") for s in (0, 1)}
    assert len(folders) == 4
    assert str(Config(data="x/cifar10").folder) == "runs/cifar10-embed-kd-seed0"
