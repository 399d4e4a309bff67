"""Programs that the benchmark of the client library runs in processes of their own."""
