"""Frozen, exported and imported banks."""

from typing import Any

import pytest
import torch
from model_cases import (
    LayerCase,
    assert_near,
    assert_states_equal,
    build_model,
    text_ids,
)

from new_llm.models import TransformerLM, merge_memory_states
from new_llm.models.layers import MemoryLayer

KINDS: dict[str, dict[str, Any]] = {
    "infini": {"num_memory_banks": 3, "segments_per_bank": 1},
    "multi_memory": {"num_memories": 3},
    "hierarchical": {"num_memories": 3},
}
by_kind = pytest.mark.parametrize("kind", KINDS)
by_rows = pytest.mark.parametrize("rows", [None, 2])


def build(*kinds: str, **options: Any) -> TransformerLM:
    cases = [LayerCase(kind, {**KINDS[kind], **options}) for kind in kinds]
    return build_model([*cases, LayerCase("pythia")], segment_length=4)


def read(model: TransformerLM, segments: int, start: int = 0, rows: int = 2) -> None:
    with torch.no_grad():
        model(text_ids(rows, 4 * segments, start), update_memory=True)


def banks(state: dict[int, dict[str, Any]], index: int, bank: int) -> list[torch.Tensor]:
    """M, z and count of one bank, with a row dimension."""
    entry = state[index]
    key = next(key for key in entry if key.endswith("memories"))
    norms = next(key for key in entry if key.endswith("memory_norms"))
    axis = entry[key].dim() - 4
    return [entry[name].select(axis, bank) for name in (key, norms, "token_counts")]


def differ(one: dict, other: dict, index: int, bank: int) -> bool:
    return not all(map(torch.equal, banks(one, index, bank), banks(other, index, bank)))


@by_rows
@by_kind
def test_frozen_banks_are_read_but_neither_written_nor_emptied(kind: str, rows: int | None) -> None:
    model = build(kind)
    model.reset_memory(rows)
    read(model, 5)
    filled = model.get_memory_state()
    ids = text_ids(2, 4, start=33)
    with torch.no_grad():
        before = model(ids)
        model.freeze_memory([1])
        assert_near(model(ids), before, 1e-12)
    read(model, 5, start=60)
    state = model.get_memory_state()
    assert [differ(state, filled, 0, bank) for bank in range(3)] == [True, False, True]
    model.reset_memory(rows)
    emptied = model.get_memory_state()
    assert [differ(emptied, filled, 0, bank) for bank in range(3)] == [True, False, True]
    assert not any(t.any() for bank in (0, 2) for t in banks(emptied, 0, bank))
    model.unfreeze_memory()
    model.reset_memory(rows)
    assert not banks(model.get_memory_state(), 0, 1)[0].any()


@by_kind
def test_writes_rotate_over_the_open_banks(kind: str) -> None:
    model = build(kind)
    model.freeze_memory([0])
    written = []
    for segment in range(4):
        before = model.get_memory_state()
        read(model, 1, start=4 * segment)
        after = model.get_memory_state()
        written.append([bank for bank in range(3) if differ(after, before, 0, bank)])
    assert written == [[1], [2], [1], [2]]
    model.freeze_memory([1, 2])
    before = model.get_memory_state()
    read(model, 3)
    assert not any(differ(model.get_memory_state(), before, 0, bank) for bank in range(3))


@by_kind
def test_streaming_honours_frozen_banks(kind: str) -> None:
    model = build(kind, "infini")
    model.freeze_memory([2])
    read(model, 2)
    held = model.get_memory_state()
    ids = text_ids(2, 14, start=50)
    with torch.no_grad():
        expected = model(ids, update_memory=True)
        state = model.get_memory_state()
        model.set_memory_state(held)
        stream = model.open_stream(2)
        pieces = [stream.feed(piece) for piece in ids.split(3, dim=1)]
        stream.close(update_memory=True)
    assert_near(torch.cat(pieces, dim=1), expected, 1e-9)
    found = model.get_memory_state()
    for index in state:
        for bank in range(3):
            for one, other in zip(banks(found, index, bank), banks(state, index, bank), strict=True):
                torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    assert not differ(found, held, 0, 2)


@by_rows
def test_frozen_flags_travel_with_the_state(rows: int | None) -> None:
    model, other = build("infini"), build("infini")
    model.reset_memory(rows)
    read(model, 3)
    model.freeze_memory([0, 2])
    other.set_memory_state(model.get_memory_state())
    for machine in (model, other):
        read(machine, 2, start=70)
    assert_states_equal(other.get_memory_state(), model.get_memory_state())
    model.unfreeze_memory([2])
    assert model.get_memory_state()[0]["frozen"].tolist() == [True, False, False]


@by_rows
def test_exported_banks_are_imported_where_asked(rows: int | None) -> None:
    kinds = ("infini", "multi_memory", "hierarchical")
    model, other = build(*kinds), build(*kinds)
    for machine, start in ((model, 0), (other, 80)):
        machine.reset_memory(rows)
        read(machine, 4, start=start)
    source, held = model.get_memory_state(), other.get_memory_state()
    exported = model.export_memory_banks([0, 2])
    other.import_memory_banks(exported)
    found = other.get_memory_state()
    for index in found:
        assert not differ(found, source, index, 0)
        assert not differ(found, source, index, 2)
        assert not differ(found, held, index, 1)
        assert differ(found, held, index, 0)
    other.set_memory_state(held)
    other.import_memory_banks(exported, [1, 0])
    found = other.get_memory_state()
    for index in found:
        for place, bank in ((1, 0), (0, 2)):
            for one, expected in zip(banks(found, index, place), banks(source, index, bank), strict=True):
                assert torch.equal(one, expected)
        assert not differ(found, held, index, 2)


def test_export_survives_torch_save(tmp_path) -> None:
    model = build("multi_memory", "hierarchical")
    read(model, 4)
    exported = model.export_memory_banks([1])
    torch.save(exported, tmp_path / "banks.pt")
    other = build("multi_memory", "hierarchical")
    other.import_memory_banks(torch.load(tmp_path / "banks.pt", weights_only=True))
    assert not any(differ(other.get_memory_state(), model.get_memory_state(), index, 1) for index in (0, 1))


def test_imported_banks_that_do_not_fit_change_nothing() -> None:
    model = build("multi_memory")
    read(model, 4)
    exported = model.export_memory_banks([0])
    held = model.get_memory_state()
    same_shape = build("infini", num_memory_heads=2).export_memory_banks([0])
    other_kind = build("hierarchical").export_memory_banks([0])
    wide = build("multi_memory", num_memory_heads=1).export_memory_banks([0])
    per_row = build("multi_memory")
    per_row.reset_memory(2)
    for bad, places in (
        (None, None),
        ({1: exported[0]}, None),
        (held, None),
        (exported, [0, 1]),
        (exported, [3]),
        (other_kind, None),
        (same_shape, None),
        ({0: {**exported[0], "version": 99}}, None),
        (wide, None),
        (per_row.export_memory_banks([0]), None),
        ({0: {**exported[0], "memories": exported[0]["memories"] * float("nan")}}, None),
    ):
        with pytest.raises(ValueError, match=r"layer|banks|NaN|version"):
            model.import_memory_banks(bad, places)  # pyright: ignore[reportArgumentType]
        assert_states_equal(model.get_memory_state(), held)


@pytest.mark.parametrize("call", ["freeze_memory", "unfreeze_memory", "export_memory_banks"])
@pytest.mark.parametrize("bank", [-1, 3])
def test_unknown_banks_are_refused(call: str, bank: int) -> None:
    model = build("infini", "multi_memory")
    read(model, 2)
    held = model.get_memory_state()
    with pytest.raises(ValueError, match=rf"banks 0 to 2.*{bank}"):
        getattr(model, call)([0, bank])
    assert_states_equal(model.get_memory_state(), held)


def test_frozen_banks_count_once_in_a_merge() -> None:
    """Both machines start from the same frozen knowledge and read on."""
    start = build("infini", use_delta_rule=False)
    read(start, 3)
    start.freeze_memory([1])
    start.reset_memory()
    common = start.get_memory_state()
    states = []
    for row in range(2):
        start.set_memory_state(common)
        with torch.no_grad():
            start(text_ids(2, 12, start=40)[row : row + 1], update_memory=True)
        states.append(start.get_memory_state())
    merged = merge_memory_states(states)
    assert not differ(merged, common, 0, 1)
    start.set_memory_state(common)
    read(start, 3, start=40)
    for bank in range(3):
        for one, other in zip(banks(merged, 0, bank), banks(start.get_memory_state(), 0, bank), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    other = {0: {**states[1][0], "memories": states[1][0]["memories"] + 1}}
    with pytest.raises(ValueError, match="frozen"):
        merge_memory_states([states[0], other])


def test_rows_with_frozen_banks_of_their_own() -> None:
    model = build("infini")
    model.reset_memory(2)
    read(model, 3)
    model.freeze_memory([0])
    with pytest.raises(ValueError, match=r"frozen banks of 2 rows.*unfreeze"):
        model.reset_memory(3)
    assert model.memory_rows == 2
    layer = model.layers[0]
    assert isinstance(layer, MemoryLayer)
    model.reset_rows(torch.tensor([True, False]))
    state = model.get_memory_state()[0]
    assert bool(state["memories"][0, 0].any())
    assert not state["memories"][0, 1:].any()
    assert bool(state["memories"][1].any())
