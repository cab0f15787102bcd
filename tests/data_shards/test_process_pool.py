"""Tasks in several processes."""

import concurrent.futures

from data_shards.writing import process_pool


def test_a_result_is_not_looked_for_among_all_tasks(monkeypatch):
    looked_at = []
    wait = concurrent.futures.wait

    def counting(futures, *arguments):
        looked_at.append(len(futures))
        return wait(futures, *arguments)

    monkeypatch.setattr(concurrent.futures, "wait", counting)
    monkeypatch.setattr(
        process_pool._Worker, "function", staticmethod(lambda task, _: -task), raising=False
    )
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        found = dict(process_pool._results(executor, range(400), 16, [0, 0], lambda *_: None))
    assert found == {task: -task for task in range(400)}
    assert max(looked_at) == 16
