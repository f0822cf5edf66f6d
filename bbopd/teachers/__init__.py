"""Teachers: across gRPC (`remote`), in this process (`local`), as a process of its own (`process`), and a small one for tests (`fake`)."""
