"""Devices, stamps and the places of the caches."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from pagedgen.autotune.device import ABSENT, device_of, stamp_of
from pagedgen.autotune.paths import CACHE_VARIABLE, publish, user_cache
from pagedgen.errors import InvalidValue
from pagedgen.values.target_table import target


def test_the_cpu_is_present_and_its_stamp_states_the_threads() -> None:
    cpu = target("cpu")
    stamp = stamp_of(cpu, "tvm 0.27.0", measured=True)
    assert device_of(cpu).present and stamp.device.endswith(f"({cpu.num_sms} threads)")
    assert cpu.arch in stamp.device, "records of one instruction set are not another's"
    assert stamp.driver.startswith("Linux ")
    assert datetime.fromisoformat(stamp.date).utcoffset() is not None


def test_a_cpu_of_another_instruction_set_is_absent() -> None:
    arm, x86 = (replace(target("cpu"), arch=arch) for arch in ("aarch64-neon", "x86_64-avx2"))
    assert ABSENT in (device_of(arm), device_of(x86))


def test_a_named_gpu_is_absent_unless_it_is_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    device_of.cache_clear()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    a100 = target("a100")
    assert device_of(a100) == ABSENT
    monkeypatch.setattr("pagedgen.autotune.device.gpu_target", lambda: target("a100-40g"))
    device_of.cache_clear()
    assert device_of(a100) == ABSENT, "the same architecture is not the same device"
    monkeypatch.setattr("pagedgen.autotune.device.gpu_target", lambda: a100)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr("pagedgen.autotune.device._gpu_driver", lambda: "580.1")
    device_of.cache_clear()
    assert device_of(a100).present and device_of(a100).driver == "driver 580.1"
    device_of.cache_clear()
    stamp = stamp_of(a100, "triton 3.7.1", measured=False)
    assert (stamp.device, stamp.driver) == ("none", "none"), "a prediction names no device"


def test_the_variable_names_the_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "deep" / "cache"))
    assert user_cache() == tmp_path / "deep" / "cache"
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "pagedgen"
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(InvalidValue, match=CACHE_VARIABLE):
        user_cache()


def test_publishing_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    publish(path, b"one")
    publish(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    assert path.stat().st_mode & 0o777 == 0o644
