"""What the statements on jobs promise, on both databases."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from serve_app.config import LimitsConfig
from serve_app.database import Database, jobs
from serve_app.errors import QueueFull
from serve_app.jobs.job import InputRef, Job, JobStatus
from serve_app.jobs.records import UNREADABLE
from serve_app.jobs.store import JobStore
from support.jobs import ALICE, BOB, RESULT, make_spec
from support.postgres import new_database


def claim(store: JobStore, count: int = 1, name: str = "one", lease_s: float = 60.0) -> tuple[Job, ...]:
    return store.claim(name, count, 1000, lease_s)


def claim_one(store: JobStore) -> Job:
    (job,) = claim(store)
    return job


def status(store: JobStore, job: Job) -> JobStatus:
    found = store.get(job.id)
    assert found is not None
    return found.status


def test_a_job_is_read_as_it_was_accepted(any_store: JobStore) -> None:
    spec = make_spec(inputs=(InputRef(field="init_image", url="https://example.org/a.png"),), webhook="https://h/w")
    job = any_store.submit(ALICE, spec)
    assert 2**40 <= job.id < 2**53
    assert (job.spec, job.tenant, job.key_id, job.status) == (spec, "alice", "key-a", JobStatus.QUEUED)
    assert job.webhook_status == "pending"
    assert any_store.get(job.id) == job
    assert any_store.find(spec.output.file_prefix) == job
    assert any_store.get(job.id + 1) is None
    assert any_store.find("other") is None


def test_ids_keep_53_bits_and_are_not_in_order(store: JobStore) -> None:
    ids = [store.submit(ALICE, make_spec()).id for _ in range(20)]
    assert len(set(ids)) == 20
    assert max(ids) < 2**53
    assert ids != sorted(ids)


def test_racing_submits_never_exceed_the_limit(any_database: Database) -> None:
    store = JobStore(any_database, LimitsConfig(queue_max=5))

    def submit(_: int) -> bool:
        try:
            store.submit(ALICE, make_spec())
        except QueueFull:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        accepted = sum(pool.map(submit, range(20)))
    assert accepted == 5
    assert store.counts() == {JobStatus.QUEUED: 5, JobStatus.PROCESSING: 0}


def test_the_refusal_names_the_limit_that_was_met(any_database: Database) -> None:
    store = JobStore(any_database, LimitsConfig(queue_max=3, queue_max_per_tenant=1))
    store.submit(ALICE, make_spec())
    with pytest.raises(QueueFull) as refusal:
        store.submit(ALICE, make_spec())
    assert "queue_max_per_tenant allows 1" in refusal.value.tip
    assert refusal.value.retry_after_s >= 1
    store.submit(BOB, make_spec())
    with pytest.raises(QueueFull):
        store.check_limits("alice")
    claim(store, 2)
    store.submit(ALICE, make_spec())


def test_racing_claims_give_each_job_to_one(any_store: JobStore) -> None:
    expected = {any_store.submit(ALICE, make_spec()).id for _ in range(40)}
    taken: list[int] = []
    start = threading.Barrier(4)

    def work(name: str) -> None:
        start.wait()
        while found := claim(any_store, 3, name):
            taken.extend(job.id for job in found)

    threads = [threading.Thread(target=work, args=(f"d{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(expected)


def test_a_claim_does_not_wait_for_a_row_that_somebody_changes(postgres_url: str) -> None:
    database = Database(new_database(postgres_url))
    database.migrate()
    store = JobStore(database, LimitsConfig())
    first, second = (store.submit(ALICE, make_spec()) for _ in range(2))
    with database.transaction() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == first.id).values(cancel_requested=True))
        assert [job.id for job in claim(store, 5)] == [second.id]
    assert [job.id for job in claim(store, 5)] == [first.id]
    database.close()


def test_tenants_take_turns(any_store: JobStore) -> None:
    alices = [any_store.submit(ALICE, make_spec()).id for _ in range(4)]
    bobs = [any_store.submit(BOB, make_spec()).id for _ in range(2)]
    order = [any_store.outlook(job_id).position for job_id in [*alices, *bobs]]
    assert order == [1, 3, 5, 6, 2, 4]
    assert [job.id for job in claim(any_store, 3)] == [alices[0], bobs[0], alices[1]]
    # Alice has two running, Bob one: it is Bob's turn.
    assert [job.id for job in claim(any_store, 1)] == [bobs[1]]
    assert any_store.outlook(alices[2]).position == 1


def test_the_cluster_runs_no_more_than_its_capacity(any_store: JobStore) -> None:
    for _ in range(5):
        any_store.submit(ALICE, make_spec())
    assert len(any_store.claim("one", 10, 2, 60.0)) == 2
    assert any_store.claim("two", 10, 2, 60.0) == ()
    assert len(any_store.claim("two", 10, 3, 60.0)) == 1


def test_one_suspect_runs_at_a_time_and_holds_up_nobody_else(any_store: JobStore) -> None:
    suspects = [any_store.submit(ALICE, make_spec()).id for _ in range(3)]
    for job in claim(any_store, 3):
        any_store.release(job.id, job.attempt, suspect=True)
    others = [any_store.submit(BOB, make_spec()).id for _ in range(2)]
    first, *rest = sorted(claim(any_store, 10), key=lambda job: not job.suspect)
    assert (first.id, {job.id for job in rest}) == (suspects[0], set(others))
    assert claim(any_store, 10, "two") == ()
    any_store.finish(first.id, first.attempt, RESULT)
    assert [job.id for job in claim(any_store, 10, "two")] == [suspects[1]]


def test_an_overtaken_attempt_changes_nothing(any_store: JobStore) -> None:
    job = any_store.submit(ALICE, make_spec())
    old = claim_one(any_store)
    assert any_store.release(job.id, old.attempt, suspect=False) is JobStatus.QUEUED
    assert not any_store.finish(job.id, old.attempt, RESULT)
    new = claim_one(any_store)
    assert (new.id, old.attempt, new.attempt) == (job.id, 1, 2)
    for late in (
        any_store.finish(job.id, old.attempt, RESULT),
        any_store.fail(job.id, old.attempt, "late"),
        any_store.cancel(job.id, old.attempt),
        any_store.release(job.id, old.attempt, suspect=True, charged=1),
        any_store.inputs.keep(job.id, old.attempt, "init_image", "inputs/x", lambda: None),
    ):
        assert not late
    assert any_store.get(job.id) == new
    assert any_store.finish(job.id, new.attempt, RESULT)
    assert not any_store.fail(job.id, new.attempt, "too late")
    ended = any_store.get(job.id)
    assert ended is not None
    assert (ended.status, ended.result, ended.error) == (JobStatus.SUCCESS, RESULT, None)


def test_any_error_text_can_be_stored(any_store: JobStore) -> None:
    job = any_store.submit(ALICE, make_spec())
    assert any_store.fail(job.id, claim_one(any_store).attempt, "a\x00b\ud800c" + "x" * 10_000)
    ended = any_store.get(job.id)
    assert ended is not None
    assert ended.error is not None
    assert ended.error.startswith("ab?c")
    assert len(ended.error) == 2000


def test_a_release_waits_and_remembers_the_blame(any_store: JobStore) -> None:
    job = any_store.submit(ALICE, make_spec())
    claimed = claim_one(any_store)
    any_store.release(job.id, claimed.attempt, suspect=True, charged=1, delay_s=0.3)
    assert claim(any_store) == ()
    time.sleep(0.35)
    again = claim_one(any_store)
    assert (again.attempt, again.suspect, again.charged) == (2, True, 1)


def test_renewing_tells_what_was_lost_and_what_shall_stop(any_store: JobStore) -> None:
    for _ in range(3):
        any_store.submit(ALICE, make_spec())
    kept, lost, unwanted = claim(any_store, 3)
    any_store.fail(lost.id, lost.attempt, "gone")
    any_store.request_cancel(unwanted.id)
    held = [(job.id, job.attempt) for job in (kept, lost, unwanted)]
    for holding in (any_store.renew(held, 60.0), any_store.inspect(held)):
        assert holding.lost == {(lost.id, lost.attempt)}
        assert holding.cancel_requested == {(unwanted.id, unwanted.attempt)}
    assert any_store.inspect([(kept.id, kept.attempt + 1)]).lost == {(kept.id, kept.attempt + 1)}


def test_a_lease_that_is_renewed_does_not_run_out(any_store: JobStore) -> None:
    any_store.submit(ALICE, make_spec())
    any_store.submit(ALICE, make_spec())
    renewed, forgotten = claim(any_store, 2, lease_s=0.3)
    any_store.renew([(renewed.id, renewed.attempt)], 60.0)
    assert any_store.sweep(50) == ()
    time.sleep(0.35)
    (swept,) = any_store.sweep(50)
    assert (swept.id, swept.status, swept.charged) == (forgotten.id, JobStatus.QUEUED, 0)
    assert any_store.sweep(50) == ()


def test_a_sweep_ends_what_was_cancelled_or_is_hopeless(any_store: JobStore) -> None:
    for _ in range(2):
        any_store.submit(ALICE, make_spec())
    cancelled, hopeless = claim(any_store, 2, lease_s=0.01)
    any_store.request_cancel(cancelled.id)
    time.sleep(0.05)
    assert {job.id: job.status for job in any_store.sweep(1)} == {
        cancelled.id: JobStatus.CANCELLED,
        hopeless.id: JobStatus.FAILED,
    }


def test_cancelling(any_store: JobStore) -> None:
    queued = any_store.submit(ALICE, make_spec())
    ended = any_store.request_cancel(queued.id)
    assert ended is not None
    assert ended.status is JobStatus.CANCELLED
    assert ended.finished_at is not None
    running = any_store.submit(ALICE, make_spec())
    claimed = claim_one(any_store)
    asked = any_store.request_cancel(running.id)
    assert asked is not None
    assert (asked.status, asked.cancel_requested, asked.finished_at) == (JobStatus.PROCESSING, True, None)
    # An attempt that is lost afterwards is not repeated.
    assert any_store.release(running.id, claimed.attempt, suspect=False) is JobStatus.CANCELLED
    again = any_store.request_cancel(running.id)
    assert again is not None
    assert again.status is JobStatus.CANCELLED
    assert any_store.request_cancel(1) is None


def test_only_the_ended_are_reported(any_store: JobStore) -> None:
    done, running, waiting = (any_store.submit(ALICE, make_spec()) for _ in range(3))
    for job in claim(any_store, 2):
        if job.id == done.id:
            any_store.finish(job.id, job.attempt, RESULT)
    found = any_store.ended([done.id, running.id, waiting.id, 5])
    assert {job_id: job.status for job_id, job in found.items()} == {done.id: JobStatus.SUCCESS}


def test_listing_pages_through_the_tenants_own_jobs(any_store: JobStore) -> None:
    expected = [any_store.submit(ALICE, make_spec()).id for _ in range(5)][::-1]
    any_store.submit(BOB, make_spec())
    seen: list[int] = []
    while page := any_store.list("alice", 2, before=seen[-1] if seen else None):
        assert len(page) <= 2
        seen += [job.id for job in page]
    assert sorted(seen) == sorted(expected)
    assert [job.created_at for job in map(any_store.get, seen) if job] == sorted(
        (job.created_at for job in map(any_store.get, seen) if job), reverse=True
    )


def test_inputs_that_jobs_share_go_with_the_last_of_them(any_store: JobStore) -> None:
    spec = make_spec(inputs=(InputRef(field="init_image", key="inputs/shared"),))
    confirmed: list[str] = []
    first = any_store.submit(ALICE, spec, lambda: confirmed.append("yes"))
    second = any_store.submit(BOB, make_spec(inputs=spec.inputs))
    assert confirmed == ["yes"]
    deleted: list[str] = []
    any_store.inputs.drop(first.id, deleted.append)  # not ended: nothing happens
    assert any_store.inputs.of(first.id) == {"init_image": "inputs/shared"}
    for job in (first, second):
        any_store.request_cancel(job.id)
    assert sorted(any_store.inputs.left_over()) == sorted([first.id, second.id])
    any_store.inputs.drop(first.id, deleted.append)
    assert deleted == []
    any_store.inputs.drop(second.id, deleted.append)
    assert deleted == ["inputs/shared"]
    assert any_store.inputs.left_over() == ()


def test_a_deletion_waits_for_a_submit_that_names_the_object(any_store: JobStore) -> None:
    """The new job looks for its input under the same lock that the deletion takes."""
    inputs = (InputRef(field="init_image", key="inputs/shared"),)
    old = any_store.submit(ALICE, make_spec(inputs=inputs))
    any_store.request_cancel(old.id)
    deleted: list[str] = []
    deletion = threading.Thread(target=any_store.inputs.drop, args=(old.id, deleted.append))

    def confirm() -> None:
        deletion.start()
        deletion.join(0.3)
        assert deletion.is_alive()

    any_store.submit(BOB, make_spec(inputs=inputs), confirm)
    deletion.join()
    assert deleted == []


def test_a_job_of_another_version_fails_and_stops_nobody_else(any_database: Database) -> None:
    store = JobStore(any_database, LimitsConfig())
    foreign = [store.submit(ALICE, make_spec(webhook="https://example.org/hook")) for _ in range(2)]
    own = store.submit(ALICE, make_spec())
    held = claim(store, 1, lease_s=0.01)
    assert [job.id for job in held] == [foreign[0].id]
    with any_database.transaction() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id != own.id).values(spec='{"version": 99}'))
    time.sleep(0.05)
    assert [job.status for job in store.sweep(50)] == [JobStatus.QUEUED]
    assert [job.id for job in claim(store, 10)] == [own.id]
    assert len(store.list("alice", 10)) == 3
    ended = store.ended([job.id for job in (*foreign, own)])
    assert ended.keys() == {job.id for job in foreign}
    for job in ended.values():
        assert (job.status, job.error) == (JobStatus.FAILED, UNREADABLE)


def test_an_untold_end_is_given_to_one_dispatcher_at_a_time(any_database: Database) -> None:
    store = JobStore(any_database, LimitsConfig())
    submitted = {store.submit(ALICE, make_spec(webhook="https://example.org/hook")).id for _ in range(20)}
    for job_id in submitted:
        store.request_cancel(job_id)
    assert store.take_untold(60.0, 60.0, 20) == ()  # too young: whoever ended it tells it
    with any_database.transaction() as connection:
        connection.execute(sa.update(jobs).values(finished_at=jobs.c.finished_at - 120))
    start = threading.Barrier(4)

    def take(_: int) -> list[int]:
        start.wait()
        return [job.id for job in store.take_untold(60.0, 60.0, 20)]

    with ThreadPoolExecutor(4) as pool:
        taken = [job_id for found in pool.map(take, range(4)) for job_id in found]
    assert sorted(taken) == sorted(submitted)
    with any_database.transaction() as connection:  # who took them died
        connection.execute(sa.update(jobs).values(lease_until=jobs.c.lease_until - 120))
    assert len(store.take_untold(60.0, 60.0, 20)) == 20


_HOLDER = """
import sys, time
from serve_app.config import LimitsConfig
from serve_app.database import Database
from serve_app.jobs.store import JobStore
store = JobStore(Database(sys.argv[1]), LimitsConfig())
(job,) = store.claim("doomed", 1, 10, 1.0)
print(job.id, job.attempt, flush=True)
while True:
    store.renew([(job.id, job.attempt)], 1.0)
    time.sleep(0.1)
"""


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.02)


def test_a_killed_process_loses_its_lease_and_nothing_else(any_database: Database) -> None:
    store = JobStore(any_database, LimitsConfig())
    job = store.submit(ALICE, make_spec())
    url = any_database.engine.url.render_as_string(hide_password=False)
    with subprocess.Popen([sys.executable, "-c", _HOLDER, url], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().split() == [str(job.id), "1"]
        time.sleep(1.3)
        assert store.sweep(50) == ()  # it is alive: its lease is renewed
        os.kill(holder.pid, signal.SIGKILL)
    wait_until(lambda: bool(store.sweep(50)))
    again = claim_one(store)
    assert (again.id, again.attempt, again.charged, again.suspect) == (job.id, 2, 0, False)
