"""Counters of the data plane, under their Prometheus names. Nothing is counted per image."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class StreamCounters:
    """Counters of one reader, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        prefix = "personmae_stream"
        self.bytes = Counter(
            f"{prefix}_bytes", "bytes fetched from the store, and bytes of shards found here", ["source"], registry=registry
        )
        self.requests = Counter(f"{prefix}_requests", "reads of the store", ["op", "outcome"], registry=registry)
        self.retries = Counter(f"{prefix}_retries", "reads that were tried again", ["reason"], registry=registry)
        self.request_seconds = Histogram(
            f"{prefix}_request_duration_seconds", "time of a read of the store", buckets=_SECONDS, registry=registry
        )
        self.corrupt = Counter("personmae_corrupt_shards", "files without the hash of the index", registry=registry)
        self.hits = Counter("personmae_cache_hits", "shards that were here when they were opened", registry=registry)
        self.misses = Counter("personmae_cache_misses", "shards that had to be fetched", registry=registry)
        self.evictions = Counter("personmae_cache_evictions", "shards removed to make room", registry=registry)
        self.cache_bytes = Gauge("personmae_cache_bytes", "size of the shard cache", registry=registry)
        self.queue = Gauge("personmae_prefetch_queue_samples", "decoded samples that wait", registry=registry)
        self.samples = Counter("personmae_stream_samples", "samples handed out", registry=registry)
        self.bad_samples = Counter("personmae_stream_bad_samples", "unreadable images replaced", registry=registry)
        self.wait_seconds = Counter("personmae_stream_wait_seconds", "time the consumer waited", registry=registry)

    def totals(self) -> dict[str, float]:
        """Every counter and gauge that is not zero, by name and labels."""
        found = {}
        for metric in self.registry.collect():
            for sample in metric.samples:
                if sample.value and not sample.name.endswith(("_created", "_bucket")):
                    labels = ",".join(f"{key}={value}" for key, value in sample.labels.items())
                    found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found
