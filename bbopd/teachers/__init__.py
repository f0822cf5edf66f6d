"""Teachers: across gRPC (`remote`), in this process (`local`), as a process of its own (`process`); `cache` keeps their answers.

`fake` is a small one for tests.
"""
