"""The benchmark suite: one script per claim, the peers in the same process and the same rounds. ``make bench`` runs it.

| file | what is in it |
|---|---|
| ``bench_*.py`` | the scripts, one per claim; pytest-benchmark runs their rounds |
| ``cases.py`` ``inputs.py`` | sizes of real models, and the tensors of one case |
| ``distill.py`` ``logprobs.py`` ``training_step.py`` | the contestants |
| ``contest.py`` ``peak_memory.py`` ``accuracy.py`` | interleaved times, peak memory in a fresh process, errors against float64 |
| ``rates.py`` ``wire*.py`` | the teacher service: rates in tokens a second, and what is moved over the wire |
| ``scoring.py`` ``server_memory.py`` | `bbopd serve` and a plain forward pass over the same sequences; a server's memory |
| ``objectives.py`` ``objective_*.py`` ``grader.py`` | each objective on a real model over seeds: ``python -m benchmarks.objectives`` |
| ``adoption.py`` | a style learned from text alone, by a game and without: ``python -m benchmarks.adoption`` |
| ``newcomer.py`` | from a clone to a first student, timed: ``python3 -m benchmarks.newcomer`` |
| ``gpu*.py`` ``clock.py`` ``on_gpu.py`` | the same on a GPU, without pytest: ``python -m benchmarks.gpu``; and ``make gpu`` |
| ``machine.py`` ``records.py`` ``report.py`` ``plots.py`` | where a figure was taken, the CSV, and the tables and plots made of it |
"""
