"""opsqueue: a batch-processing queue for heavy loads. Programs import `opsqueue.producer` and `opsqueue.consumer`."""
