"""Adapters (LoRA) share slots: by need, in turn, and never two in one."""

from hypothesis import given
from hypothesis import strategies as st

from pagedcore.scheduling.adapters import MAX_PASSED, AdapterSlots


def test_no_adapter_needs_no_slot():
    slots = AdapterSlots(0)
    assert slots.admits("", passes=True)
    slots.take("")
    slots.release("")
    assert slots.slot_of("") == -1
    assert not slots.admits("a", passes=False)


def test_an_adapter_keeps_its_slot_while_rows_use_it():  # LORA-1
    slots = AdapterSlots(1)
    slots.take("a")
    slots.take("a")
    slots.release("a")
    assert not slots.admits("b", passes=False)
    assert slots.admits("a", passes=False)
    slots.release("a")
    assert slots.admits("b", passes=False)


def test_an_idle_adapter_is_still_there_until_its_slot_is_needed():
    slots = AdapterSlots(2)
    for key in "ab":
        slots.take(key)
    place = slots.slot_of("a")
    for key in "ba":  # b is idle longer
        slots.release(key)
    slots.take("c")
    slots.take("a")
    assert slots.slot_of("a") == place != slots.slot_of("c")


def test_only_so_many_pass_one_that_waits():  # SCHED-5
    slots = AdapterSlots(1)
    slots.take("a")
    assert not slots.admits("b", passes=False)
    assert slots.admits("a", passes=True)
    slots.count_passed(MAX_PASSED)
    assert not slots.admits("a", passes=True)
    assert slots.admits("", passes=True)
    slots.count_passed(None)
    assert slots.admits("a", passes=True)


@given(
    num_slots=st.integers(1, 3),
    moves=st.lists(st.tuples(st.booleans(), st.sampled_from("abcde")), max_size=60),
)
def test_adapters_that_run_have_slots_of_their_own(num_slots, moves):
    slots = AdapterSlots(num_slots)
    running = []
    for takes, key in moves:
        if takes and slots.admits(key, passes=False):
            slots.take(key)
            running.append(key)
        elif not takes and key in running:
            slots.release(key)
            running.remove(key)
        places = [slots.slot_of(key) for key in set(running)]
        assert len(set(places)) == len(places) == slots.num_running <= num_slots
        assert all(0 <= place < num_slots for place in places)
        assert slots.admits("new", passes=False) == (len(places) < num_slots)
