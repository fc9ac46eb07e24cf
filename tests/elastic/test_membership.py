"""Exit codes, the restart budget, admissible worlds and the course of a round, as functions of the shared record."""

from dataclasses import replace

import pytest

from launcher.elastic import membership
from launcher.elastic.membership import Budget, Node, Policy, Reason, Record, Report, Round

POLICY = Policy(1, 2, max_restarts=2, backoff_seconds=5)


def node(name: str, num_ranks: int = 1) -> Node:
    return Node(name, f"host-{name}", f"10.0.0.{ord(name) - 96}", 1000, num_ranks)


def running(*names: str, policy: Policy = POLICY) -> Record:
    """A round of these nodes."""
    record = Record()
    for name in names:
        record = membership.join(record, node(name))
    return membership.form(record, policy, settled=True)


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ([0, 0], "complete"),
        ([75, 75], "stopped"),
        ([0, 75], "mixed"),
        ([], "mixed"),
        ([75, 1], "failed"),
        ([137, 0], "failed"),
        ([1, 78, 75], "user_error"),
    ],
)
def test_exit_codes_of_a_host_are_classified_together(codes, verdict):
    assert membership.classify_exit_codes(codes) == verdict


def test_a_failure_counts_and_progress_clears_the_budget():
    budget, counted = membership.charge(Budget(), "worker_error", 0)
    assert (budget.failures, counted) == (1, True)
    budget, _ = membership.charge(budget, "hang", 0)
    assert budget.failures == 2
    budget, _ = membership.charge(budget, "worker_error", 10)
    assert budget.failures == 1
    budget, _ = membership.charge(budget, "worker_error", 10)
    assert budget.failures == 2


@pytest.mark.parametrize("reason", ["peer_lost", "member_joined"])
def test_a_change_of_members_never_counts(reason: Reason):
    budget = Budget(step=7)
    for _ in range(5):
        budget, counted = membership.charge(budget, reason, 7)
        assert not counted
    assert budget.failures == 0


def test_of_stops_without_progress_only_the_first_is_free():
    budget, counted = membership.charge(Budget(), "stopped", 5)
    assert not counted
    charged = []
    for _ in range(3):
        budget, counted = membership.charge(budget, "stopped", 5)
        charged.append(counted)
    assert charged == [False, True, True]
    budget, counted = membership.charge(budget, "sigterm", 6)
    assert (budget.failures, budget.stops, counted) == (0, 0, False)


def test_pauses_double_and_are_bounded():
    assert [membership.pause_seconds(n, 5) for n in range(5)] == [0, 5, 10, 20, 40]
    assert membership.pause_seconds(50, 5) == 300


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (2, 2), (3, 3), (5, 4), (7, 6), (11, 6), (12, 12), (40, 12)])
def test_the_largest_admissible_world_divides_the_batch(most, expected):
    assert membership.largest_admissible(12, most) == expected


def test_an_inadmissible_world_waits_or_runs_a_part_of_the_ranks():
    nodes = [node("a", 4), node("b", 4), node("c", 4)]
    for count, wait, subset, share in ((1, 4, 4, (4,)), (2, 8, 8, (4, 4)), (3, 0, 8, (4, 4, 0))):
        some = nodes[:count]
        assert membership.world_of(some, Policy(1, 3, batch=16)) == wait
        policy = Policy(1, 3, batch=16, inadmissible="subset")
        assert membership.world_of(some, policy) == subset
        assert membership.shares(some, subset) == share
    assert membership.world_of(nodes, Policy(1, 3)) == 12


def test_the_record_survives_its_text():
    record = membership.report(running("a", "b"), 1, Report("hang", "host-a", 3, 1.5, 0, None, "line\nline"), POLICY)
    record = membership.close(membership.join(record, node("a")), 78, "error: x")
    assert membership.from_json(membership.to_json(record)) == record


def test_first_comers_are_waited_for_and_a_full_round_forms_at_once():
    record = membership.join(Record(), node("a"))
    assert membership.form(record, POLICY, settled=False) == record
    assert membership.form(record, POLICY, settled=True).round.world_size == 1
    record = membership.join(record, node("b"))
    assert membership.form(record, POLICY, settled=False).round.world_size == 2


def test_fewer_nodes_than_the_least_form_nothing():
    record = membership.join(Record(), node("a"))
    assert membership.form(record, Policy(2, 4), settled=True) == record


def test_the_next_round_waits_for_all_survivors_and_keeps_their_order():
    record = running("b", "a", policy=Policy(1, 3))
    order = [n.id for n in record.round.nodes]
    record = membership.report(record, 1, Report("worker_error", "host-a"), POLICY)
    record = membership.join(record, node(order[1]))
    assert membership.form(record, Policy(1, 3), settled=True).round.number == 1
    record = membership.join(membership.join(record, node("0")), node(order[0]))
    formed = membership.form(record, Policy(1, 3), settled=False)
    assert [n.id for n in formed.round.nodes] == [*order, "0"]
    assert formed.round.number == 2
    assert formed.waiting == ()


def test_a_lost_node_ends_the_round_without_a_charge():
    record = membership.expire(running("a", "b"), {"b"}, POLICY)
    assert [r.reason for r in record.round.reports] == ["peer_lost"]
    assert record.round.broken
    assert record.round.active == ("a",)
    assert record.budget.failures == 0
    formed = membership.form(membership.join(record, node("a")), POLICY, settled=False)
    assert formed.round.world_size == 1


def test_a_node_that_leaves_with_ranks_at_work_ends_the_round_for_the_others():
    record = membership.leave(running("a", "b"), "b", POLICY)
    assert [r.reason for r in record.round.reports] == ["peer_lost"]
    assert record.round.active == ("a",)
    reported = membership.report(running("a", "b"), 1, Report("sigterm", "host-b"), POLICY)
    assert len(membership.leave(reported, "b", POLICY).round.reports) == 1  # they know already, and are saving
    done = membership.finish(running("a", "b"), 1, "b")
    assert membership.leave(done, "b", POLICY).round.reports == ()


def test_a_spare_node_comes_and_goes_without_a_word():
    policy = Policy(1, 3, batch=2, inadmissible="subset")
    record = running("a", "b", "c", policy=policy)
    assert record.round.shares == (1, 1, 0)
    for gone in (membership.expire(record, {"c"}, policy), membership.leave(record, "c", policy)):
        assert gone.round.reports == ()
        assert gone.round.active == ("a", "b")
        assert not membership.grow(membership.join(gone, node("d")), policy)
        assert membership.grow(membership.join(gone, node("d")), replace(policy, batch=3))  # "c" takes no place


def test_asking_to_join_again_does_not_take_a_node_out_of_the_round_that_has_just_formed():
    record = running("a", "b")
    assert membership.join(record, node("a"), 0) == record  # asked before round 1 had formed
    assert membership.join(record, node("a"), 1).awaits("a")


def test_only_the_first_report_is_charged_and_the_earliest_failure_is_shown():
    record = membership.report(running("a", "b"), 1, Report("worker_error", "host-b", time=2.0, rank=1), POLICY)
    record = membership.report(record, 1, Report("worker_error", "host-a", time=1.0, rank=0), POLICY)
    assert record.budget.failures == 1
    assert record.round.pause_seconds == 5
    assert record.round.first_failure is not None
    assert record.round.first_failure.host == "host-a"
    assert membership.report(record, 0, Report("hang", "host-a"), POLICY) == record  # of a round long gone


def test_a_failure_that_follows_from_an_orderly_end_is_not_shown_as_its_cause():
    record = membership.report(running("a", "b"), 1, Report("sigterm", "host-b"), POLICY)
    assert not record.round.broken
    record = membership.report(record, 1, Report("worker_error", "host-a"), POLICY)
    assert record.round.broken
    assert record.round.first_failure is None
    assert record.budget.failures == 0


def test_failures_beyond_the_budget_close_the_run():
    record = running("a")
    for number in range(1, 4):
        assert record.closed is None
        record = membership.report(record, number, Report("worker_error", "host-a", 4, rank=0, code=1), POLICY)
        record = membership.form(membership.join(record, node("a")), POLICY, settled=False)
    assert record.closed is not None
    assert record.closed.code == 1
    assert "3 failures without progress, the last is worker_error: rank 0 on host-a ended with code 1" in record.closed.message


def test_the_run_is_complete_when_all_nodes_with_ranks_are():
    policy = Policy(1, 3, batch=2, inadmissible="subset")
    record = running("a", "b", "c", policy=policy)
    assert record.round.shares == (1, 1, 0)
    record = membership.finish(record, 1, "a")
    assert record.closed is None
    record = membership.finish(record, 1, "b")
    assert record.closed is not None
    assert record.closed.code == 0


def test_a_user_error_overrides_a_failure_and_the_first_message_stays():
    record = membership.close(running("a"), 1, "failed")
    record = membership.close(record, 78, "")
    record = membership.close(record, 78, "error: fix this")
    assert membership.close(record, 78, "error: other") == record
    assert membership.close(record, 0, "") == record
    assert record.closed == membership.Closed(78, "error: fix this")


def test_a_newcomer_is_taken_in_only_when_the_world_grows_by_it():
    policy = Policy(1, 3, batch=2)
    record = membership.join(running("a", policy=policy), node("b"))
    assert membership.grow(record, policy)
    record = membership.join(running("a", "b", policy=policy), node("c"))
    assert not membership.grow(record, policy)
    assert not membership.grow(record, replace(policy, inadmissible="subset"))
    assert membership.grow(record, replace(policy, batch=None))
    assert not membership.grow(record, replace(policy, batch=None, max_nodes=2))


def test_a_finished_run_is_begun_anew_once_everybody_has_left():
    record = membership.close(running("a"), 78, "error: x")
    assert membership.join(record, node("b")) == record
    fresh = membership.join(membership.leave(record, "a", POLICY), node("b"))
    assert fresh == Record(Round(number=1), (node("b"),))


def test_ranks_of_a_node_follow_those_before_it():
    nodes = (node("a", 2), node("b", 3))
    now = Round(1, nodes, (2, 3), ("a", "b"))
    assert now.place("a") == (0, 2)
    assert now.place("b") == (2, 3)
    assert now.place("c") is None
