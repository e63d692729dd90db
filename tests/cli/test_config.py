"""Settings from presets, files and words: what wins, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from spcl_fast.config import Config, rules
from spcl_fast.config import load as settings
from spcl_fast.config.load import dump_config, load_config
from spcl_fast.errors import ConfigError

ROOTS = [("source.root", "a"), ("target.root", "b")]


def message(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_later_wins_from_defaults_to_command_line(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("adapt: {lr: 0.1, keep: 0.2, contrast_weight: 0.3}\nseed: 5\n")
    second.write_text("adapt:\n  keep: 0.25\n  contrast_temperature: 7\n")
    config = load_config(
        "gta5_cityscapes", [first, second], ["released"], [("adapt.min_pixels", "9"), ("adapt.lr", "1e-4")]
    )
    assert config.adapt.lr == 1e-4  # the command line over a file
    assert config.adapt.keep == 0.1 and config.adapt.absent == "decay"  # an overlay over files
    assert config.adapt.contrast_temperature == 100  # the overlay again
    assert config.seed == 5  # a file over the defaults
    assert config.source.dataset == "gta5" and config.adapt.batch_size == 4 and config.adapt.min_pixels == 9


@pytest.mark.parametrize("preset", settings.available("preset"))
def test_every_preset_is_whole_and_survives_the_way_to_yaml_and_back(preset, tmp_path):
    for sets in ([], *([name] for name in settings.available("set"))):
        config = load_config(preset, sets=sets, overrides=[*ROOTS, ("target.labelled", "2")])
        rules.check_config(config)
        path = tmp_path / f"{preset}.yaml"
        path.write_text(dump_config(config))
        assert load_config(files=[path]) == config


def test_near_zooms_less_into_every_source_image_and_leaves_the_target_alone():
    plain, near = load_config("folders"), load_config("folders", sets=["near"])
    for stage in ("source_only", "control", "warmup", "few_labels", "adapt"):
        before, after = getattr(plain, stage).augment, getattr(near, stage).augment
        assert after == dataclasses.replace(before, scale=(1.0, 2.0), rare_crop=0.5) != before
    assert near.adapt.target_augment == plain.adapt.target_augment
    assert (near.distill, near.oracle, near.target) == (plain.distill, plain.oracle, plain.target)


@pytest.mark.parametrize("preset", ["gta5_cityscapes", "synthia_cityscapes", "synscapes_cityscapes"])
def test_released_hyper_parameters(preset):
    config = load_config(preset)
    for stage in (config.warmup, config.adapt):
        assert (stage.iterations, stage.schedule_iterations, stage.power, stage.lr, stage.batch_size) == (
            40_000,
            62_500,
            0.9,
            2.5e-4,
            4,
        )
        assert (stage.optimizer, stage.head_multiplier, stage.momentum, stage.weight_decay) == ("sgd", 10, 0.9, 5e-4)
        assert (stage.temperature, stage.augment.jitter, stage.augment.flip) == (1.8, 0.5, 0)
        assert stage.balanced_sampling is (preset != "synscapes_cityscapes")
    assert (config.warmup.adversarial_weight, config.warmup.discriminator_lr, config.warmup.init) == (
        1e-3,
        1e-4,
        "weights",
    )
    assert (config.adapt.contrast_weight, config.adapt.contrast_temperature, config.adapt.keep) == (1, 100, 0.1)
    assert config.adapt.target_augment == type(config.adapt.target_augment)()
    distill = config.distill
    assert (distill.iterations, distill.schedule_iterations, distill.lr, distill.batch_size) == (
        20_000,
        31_250,
        5e-4,
        8,
    )
    assert (distill.freeze_bn, distill.augment.crop, distill.augment.scale, distill.augment.flip) == (
        False,
        (1024, 512),
        (0.5, 1.5),
        0.5,
    )
    assert (config.source.size, config.target.size, config.target.eval_size) == ((1280, 720), (1024, 512), (1024, 512))
    assert config.model.name == "deeplab_v2_resnet101" and config.source.num_classes == (
        16 if "synthia" in preset else 19
    )


def test_defaults_are_corrected_and_released_brings_every_quirk_back():
    default, released = load_config("gta5_cityscapes"), load_config("gta5_cityscapes", sets=["released"])
    assert (default.adapt.absent, default.model.frozen_bn_eps, default.pseudo_label.estimate_size) == (
        "keep",
        1e-5,
        None,
    )
    assert default.evaluate.selection == "last"  # never the target's labels without being asked
    assert (released.adapt.absent, released.model.frozen_bn_eps, released.pseudo_label.estimate_size) == (
        "decay",
        0,
        (1024, 512),
    )
    assert released.evaluate.selection == "target_val"


def test_no_preset_picks_a_checkpoint_by_target_labels():
    assert all(load_config(preset).evaluate.selection != "target_val" for preset in settings.available("preset"))


@pytest.mark.parametrize("name", ["CPA_LOSS", "SOLVER.CPA_LOSS", "adapt.CPA_LOSS"])
def test_the_shipped_scripts_name_of_the_contrast_weight_is_understood(name, tmp_path):
    assert load_config(overrides=[(name, "0.25")]).adapt.contrast_weight == 0.25
    (tmp_path / "x.yaml").write_text(f"{name}: 0.5" if "." not in name else f"{name.split('.')[0]}:\n  CPA_LOSS: 0.5\n")
    assert load_config(files=[tmp_path / "x.yaml"]).adapt.contrast_weight == 0.5


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("source.size", "320x240", (320, 240)),
        ("source.size", "320,240", (320, 240)),
        ("source.size", "[320, 240]", (320, 240)),
        ("adapt.augment.scale", "0.5,1.5", (0.5, 1.5)),
        ("adapt.augment.crop", "null", None),
        ("adapt.lr", "1e-4", 1e-4),
        ("adapt.batch-size", "2", 2),
        ("name", "12", "12"),
        ("stages", "warmup,adapt", ("warmup", "adapt")),
        ("loop.channels_last", "true", True),
    ],
)
def test_values_may_be_typed_as_a_shell_likes_them(key, text, value):
    config = load_config(overrides=[(key, text)])
    for part in settings.canonical(key).split("."):
        config = getattr(config, part)
    assert config == value


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("adapt.contrast_temprature", "1", ["'adapt.contrast_temprature'", "did you mean adapt.contrast_temperature?"]),
        ("contrast_temperature", "1", ["did you mean adapt.contrast_temperature?"]),
        ("adpt.keep", "1", ["adapt.keep"]),
        ("nonsense", "1", ["unknown setting 'nonsense'", "spcl-fast run --help"]),
        ("adapt", "1", ["group of settings", "adapt.iterations"]),
        ("adapt.lr", "fast", ["adapt.lr (command line)", "'fast'", "expected a number"]),
        ("adapt.iterations", "1.5", ["adapt.iterations", "'1.5'", "a whole number"]),
        ("loop.channels_last", "perhaps", ["loop.channels_last", "true or false"]),
        ("source.size", "big", ["source.size", "two whole numbers such as 1280,720"]),
    ],
)
def test_a_wrong_word_is_told_with_key_value_and_expectation(key, text, words):
    told = message(load_config, overrides=[(key, text)])
    assert all(word in told for word in words), told


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("adapt: {contrast_weigth: 1}", ["x.yaml", "adapt.contrast_weight?"]),
        ("adapt: {lr: fast}", ["adapt.lr", "x.yaml", "expected a number"]),
        ("adapt: 3", ["adapt", "group of settings"]),
        ("- a\n- b", ["expected settings", "list"]),
        ("adapt: {lr: 1", ["not valid YAML", "line 1, column 14"]),
        ("seed: 1\nname: a: b", ["not valid YAML", "line 2, column 8"]),
        ("seed: 1\nadapt: {lr: 1}\nseed: 2", ["'seed' is given twice", "line 3"]),
        ("seed: !!python/object/apply:os.system ['echo hacked']", ["not valid YAML", "python/object"]),
        ("seed: 1\n\x00", ["not valid YAML"]),
    ],
)
def test_a_broken_file_is_told_with_its_name_and_runs_nothing(content, words, tmp_path, capfd):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    told = message(load_config, files=[path])
    assert all(word in told for word in words), told
    assert "<" not in told.replace("'<stream end>'", "") and "^" not in told  # no words of the reader's about itself
    assert "hacked" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        ("source: {size: 1280x720}", "source.size", (1280, 720)),
        ("source: {size: '640,480'}", "source.size", (640, 480)),
        ("source: {size: [640, 480]}", "source.size", (640, 480)),
        ("stages: warmup,adapt", "stages", ("warmup", "adapt")),
        ("adapt:\n  augment: {crop: null}\n  augment.scale: 0.5,1.5", "adapt.augment.scale", (0.5, 1.5)),
        ("adapt: {iterations: 017}", "adapt.iterations", 17),  # YAML 1.1 alone would read 15
        ("adapt: {iterations: 1_000}", "adapt.iterations", 1000),
        ("adapt: {lr: 1e-4}", "adapt.lr", 1e-4),  # YAML 1.1 alone would read text
        ("adapt: {lr: 1}", "adapt.lr", 1.0),
        ("model: {freeze_bn: no}", "model.freeze_bn", False),
        ("loop: {offload: TRUE}", "loop.offload", True),
        ("name: 12", "name", "12"),
        ("name: 2024-01-02", "name", "2024-01-02"),
        ("evaluate: {images: ~}", "evaluate.images", None),
        ("evaluate: {images: }", "evaluate.images", None),
        ("adapt: {augment: {crop: null}}", "adapt.augment.crop", None),
    ],
)
def test_a_file_is_read_as_the_command_line_is(content, key, value, tmp_path):
    (tmp_path / "x.yaml").write_text(content)
    found = load_config(files=[tmp_path / "x.yaml"])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("model: {freeze_bn: }", "model.freeze_bn (x.yaml): got null, expected true or false"),
        ("adapt: {lr: }", "adapt.lr (x.yaml): got null, expected a number"),
        ("target: {root: ~}", "target.root (x.yaml): got null, expected text"),
        ("adapt: {lr: 12:30}", "adapt.lr (x.yaml): got '12:30', expected a number"),
        ("adapt: {iterations: 0x10}", "adapt.iterations (x.yaml): got '0x10', expected a whole number"),
        ("adapt: {iterations: 1.0}", "adapt.iterations (x.yaml): got '1.0', expected a whole number"),
        ("adapt: {iterations: yes}", "adapt.iterations (x.yaml): got 'yes', expected a whole number"),
        ("adapt: {lr: [1]}", "adapt.lr (x.yaml): got ['1'], expected a number"),
        ("source: {size: 640}", "source.size (x.yaml): got '640', expected two whole numbers such as 1280,720"),
        (
            "source: {size: [1, 2, 3]}",
            "source.size (x.yaml): got ['1', '2', '3'], expected two whole numbers such as 1280,720",
        ),
        ("stages: {adapt: 1}", "unknown setting 'stages.adapt' (x.yaml)"),
        ("adapt: {absent: keeep}", "got 'keeep', expected one of keep, decay; did you mean keep?"),
        ("model: {name: resnet101}", "expected one of deeplab_v2_resnet101"),
    ],
)
def test_what_a_file_cannot_mean_is_refused_as_on_the_command_line(content, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(content)
    assert told in message(load_config, files=["x.yaml"])


def test_a_null_is_refused_for_every_setting_that_has_none(tmp_path):
    for key, setting in settings.all_settings().items():
        given = {key: settings.GivenValue(None, "x.yaml")}
        if setting.default is None or "null" in setting.expected():
            assert settings.build_config(given)
        else:
            assert f"{key} (x.yaml): got null, expected" in message(settings.build_config, given)


def test_all_values_that_do_not_fit_are_reported_at_once():
    told = message(load_config, overrides=[("adapt.lr", "fast"), ("seed", "one"), ("loop.precision", "fp16")])
    assert [line.split()[0] for line in told.splitlines()] == ["adapt.lr", "seed", "loop.precision"]


def test_home_folders_are_expanded_wherever_a_path_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("target: {root: ~/data}\nname: ~x\n")
    config = load_config(files=[tmp_path / "x.yaml"], overrides=[("source.root", "~/a"), ("model.weights", "~/w.pth")])
    assert config.target.root == str(tmp_path / "data") and config.source.root == str(tmp_path / "a")
    assert config.model.weights == str(tmp_path / "w.pth") and config.name == "~x"
    paths = {key for key, setting in settings.all_settings().items() if setting.about.path}
    assert {
        "runs_dir",
        "source.root",
        "source.classes",
        "pseudo_label.folder",
        "prototypes.file",
        "loop.resume",
    } <= paths


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert load_config(files=[tmp_path / "x.yaml"]).seed == 3


def test_missing_files_presets_and_overlays_are_told(tmp_path):
    assert "no such file" in message(load_config, files=[tmp_path / "none.yaml"])
    assert "did you mean gta5_cityscapes?" in message(load_config, preset="gta5_cityscape")
    assert "released" in message(load_config, sets=["releasd"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"adapt.contrast_temperature": "0"}, ["adapt.contrast_temperature: got 0.0, expected a number above 0"]),
        ({"adapt.contrast_temperature": "-1"}, ["adapt.contrast_temperature"]),
        ({"adapt.keep": "1.5"}, ["adapt.keep: got 1.5, expected a number from 0 to 1"]),
        ({"source.dataset": "gta"}, ["source.dataset (command line): got 'gta'", "did you mean gta5?"]),
        ({"adapt.absent": "drop"}, ["adapt.absent (command line): got 'drop', expected one of keep, decay"]),
        ({"loop.device": "gpu"}, ["cuda:N"]),
        ({"name": "../x"}, ["name: got '../x'", "without a slash"]),
        ({"stages": "warmup,adaptt"}, ["stages (command line): got 'warmup,adaptt'", "did you mean adapt?"]),
        ({"adapt.schedule_iterations": "10"}, ["adapt.schedule_iterations: got 10", "adapt.iterations"]),
        ({"adapt.augment.scale": "2,1"}, ["adapt.augment.scale"]),
        ({"adapt.augment.crop": "0,10"}, ["adapt.augment.crop"]),
        ({"source.dataset": "synthia"}, ["expected 16"]),
        ({"source.dataset": "gta5", "target.dataset": "cityscapes", "target.num_classes": "16"}, ["differ"]),
        ({"model.name": "resnet101"}, ["model.name", "deeplab_v2_resnet101"]),
        ({"pseudo_label.cap": "90"}, ["pseudo_label.cap", "at most 1"]),
        ({"evaluate.selection": "best"}, ["source_val"]),
        ({"evaluate.window": "0,64"}, ["evaluate.window: got 0,64"]),
        ({"evaluate.window_stride": "32,32"}, ["evaluate.window_stride: got 32,32 without evaluate.window"]),
        (
            {"evaluate.window": "64,48", "evaluate.window_stride": "32,49"},
            ["evaluate.window_stride: got 32,49, expected at most evaluate.window (64,48)"],
        ),
    ],
)
def test_impossible_settings_are_refused_in_words(given, words):
    told = message(lambda: rules.check_config(load_config(overrides=[*ROOTS, *given.items()])))
    assert all(word in told for word in words), told


def test_a_learning_rate_that_is_not_finite_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("adapt: {lr: .nan}")
    config = load_config(files=[tmp_path / "x.yaml"], overrides=ROOTS)
    assert "adapt.lr: got nan, expected a finite number" in message(rules.check_config, config)


def test_all_broken_rules_are_told_at_once():
    told = message(rules.check_config, load_config(overrides=[("adapt.keep", "2"), ("seed", "-1")]))
    assert len(told.splitlines()) == 4 and "source.root" in told and "target.root" in told


def test_only_the_domains_that_a_stage_reads_need_a_root():
    source_alone = load_config(overrides=[("source.root", "a")])
    rules.check_config(source_alone, ("prototypes",))
    assert "--target.root" in message(rules.check_config, source_alone, ("adapt",))
    assert "--source.root" in message(rules.check_config, load_config(overrides=[("target.root", "b")]), ("adapt",))


def test_the_package_default_is_a_valid_config_and_frozen():
    rules.check_config(load_config(overrides=ROOTS))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_settings_file_is_read_as_editors_save_it(tmp_path, encoding):
    (tmp_path / "c.yaml").write_text("adapt:\n  lr: 0.25\nname: größe\n", encoding=encoding)
    config = load_config(None, [tmp_path / "c.yaml"])
    assert (config.adapt.lr, config.name) == (0.25, "größe")
