"""How long a store is asked again for what it does not give."""

import boto3.session
import pytest
from botocore.config import Config

from personmae.data import attempts
from personmae.data.counters import StreamCounters
from personmae.errors import UserError
from personmae.monitor import heartbeat
from personmae.system import storage


def test_an_address_that_nobody_answers_at_is_told_at_once_but_waited_for_below_an_agent(s3_server, monkeypatch):
    s3_server.bucket("bucket")
    monkeypatch.setattr(attempts, "FIRST_DELAY_SECONDS", 0.01)

    def ask() -> int:
        client = boto3.client("s3", endpoint_url=endpoints.pop(0), config=Config(retries={"total_max_attempts": 1}))
        with storage.explained("s3://bucket", "listing"):
            return client.list_objects_v2(Bucket="bucket")["KeyCount"]

    endpoints = ["http://127.0.0.1:1", s3_server.endpoint]
    monkeypatch.delenv(heartbeat.DIRECTORY, raising=False)
    with pytest.raises(UserError, match="Could not connect"):
        attempts.persist(ask, "s3://bucket", 5, StreamCounters())
    endpoints = ["http://127.0.0.1:1", "http://127.0.0.1:1", s3_server.endpoint]
    monkeypatch.setenv(heartbeat.DIRECTORY, "/somewhere")
    assert attempts.persist(ask, "s3://bucket", 5, StreamCounters()) == 0
    endpoints = ["http://127.0.0.1:1"] * 3
    with pytest.raises(UserError, match="Tried again for 0 s"):
        attempts.persist(ask, "s3://bucket", 0.0, StreamCounters())
