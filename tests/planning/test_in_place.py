"""What a token costs one CPU that uses a checkpoint's files in place."""

import pathlib

import pytest

import checkpoint
from grok1.cli.parsing import parse_arguments
from grok1.formats import mapped
from grok1.parameters import shapes_with_4_bits
from grok1.planning import in_place
from model import grok_1
from runner import with_settings
from small import config_of, save_layers


def test_bytes_are_those_of_the_files(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "LEAST_BYTES", 0)
    source = save_layers(tmp_path / "source", 3)
    checkpoint.convert(source, tmp_path / "mapped", "mapped")
    files = {p.name: p.stat().st_size - mapped.HEADER for p in (tmp_path / "mapped").glob("*s")}
    sizes = {name: size for name, size in files.items() if "embeddings" not in name}
    experts = sum(size for name, size in sizes.items() if ".moe." in name)
    config = with_settings(config_of(3), "float32", None)
    total, shapes = sum(sizes.values()), config.param_shapes()
    assert "rounded_table.values.safetensors" in sizes
    assert in_place.used_bytes(config, shapes) == (total - experts, experts)
    assert in_place.estimate(config, shapes, None).touched == total  # both experts are chosen
    object.__setattr__(config.model, "num_experts", 8)
    assert in_place.estimate(config, shapes, None).touched == total - 3 * experts // 4


def test_grok_1_touches_a_quarter_of_its_experts() -> None:
    config, shapes = with_settings(grok_1(), "float32", None), grok_1().param_shapes()
    found = in_place.estimate(config, shapes, None)
    assert 316e9 < found.total < 318e9 and 84e9 < found.touched < 85e9
    found = in_place.estimate(config, shapes_with_4_bits(shapes), None)
    assert 171e9 < found.total < 173e9 and 48e9 < found.touched < 49e9


def test_a_converted_table_is_memory_and_not_used_in_place() -> None:
    config = with_settings(grok_1(), "float32", None)
    copied = with_settings(grok_1(), "bfloat16", None)
    shapes = grok_1().param_shapes()
    table = 131_072 * 6_144
    assert in_place.copied_bytes(config, shapes) == 0
    assert in_place.copied_bytes(copied, shapes) == 2 * table
    rounded = 2 * table + 8 * 131_072
    assert (
        in_place.used_bytes(config, shapes)[0] - in_place.used_bytes(copied, shapes)[0] == rounded
    )
    assert "besides 1.61 GB of memory" in in_place.sentence(in_place.estimate(copied, None, None))
    assert "besides" not in in_place.sentence(in_place.estimate(config, None, None))


def test_times_follow_from_the_disk_and_what_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(1)
    shapes = config.param_shapes()
    always, experts = in_place.used_bytes(config, shapes)
    total = always + experts
    monkeypatch.setattr(in_place, "available_memory", lambda: total // 2 + 100)
    monkeypatch.setattr(in_place, "disk_rate", lambda _: 1000.0)
    found = in_place.estimate(config, None, pathlib.Path(), held=100)
    assert found.share == pytest.approx(0.5, abs=1e-3)
    assert found.chunk_s == pytest.approx(total / 2000)
    assert found.token_s == pytest.approx((total - total // 2) / 1000)
    object.__setattr__(config.model, "num_experts", 8)  # a token uses 2 of them
    nothing = in_place.estimate(config, shapes, pathlib.Path(), held=100 + total // 2)
    assert nothing.token_s == pytest.approx((always + experts / 4) / 1000)
    monkeypatch.setattr(in_place, "available_memory", lambda: always + experts // 5)
    some = in_place.estimate(config, shapes, pathlib.Path())
    assert some.token_s == pytest.approx(0.25 * (experts - experts // 5) / 1000)
    assert some.chunk_s == pytest.approx((experts - experts // 5) / 1000)
    object.__setattr__(config.model, "num_experts", 2)
    assert "memory can hold 50%" in in_place.sentence(found)
    assert "at the disk's 1 kB/s this takes about" in in_place.sentence(found)
    unknown = in_place.estimate(config, None, None)
    assert "the rate of the disk is not known" in in_place.sentence(unknown)
    monkeypatch.setattr(in_place, "available_memory", lambda: 2 * total)
    assert "which are read once" in in_place.sentence(in_place.estimate(config, None, None))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mapped"], "--mapped needs --plan"),
        (["--plan", "--mapped", "--accelerator", "h100"], "--mapped and --accelerator do not go"),
        (["--plan", "--mapped", "--mesh", "1,8"], "--mapped and --mesh do not go together"),
        (["--plan", "--mapped", "--device-memory", "1GB"], "--mapped and --device-memory do not"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_rate_of_a_disk_is_that_of_its_largest_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_place.disk_rate(tmp_path) is None
    monkeypatch.setattr(in_place, "MEASURED", 2 * in_place.PIECE)
    (tmp_path / "small").write_bytes(bytes(100))
    assert in_place.disk_rate(tmp_path) is None
    (tmp_path / "large").write_bytes(bytes(3 * in_place.PIECE))
    rate = in_place.disk_rate(tmp_path)
    assert rate is None or rate > 1e6  # a file system may not support reading past its cache
