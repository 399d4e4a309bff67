"""opsqueue: a batch-processing queue for heavy loads. Client code imports `opsqueue.producer` and `opsqueue.consumer`."""
