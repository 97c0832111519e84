"""The run folder: all results of a run, and everything that is needed to resume it.

```
RUN/config.toml              the resolved config, with versions and seed: enough to run it again
RUN/metrics.jsonl            one line per round
RUN/about.json               machine, split and held-out rows, for the report
RUN/answers.jsonl            what the model answered to the held-out rows, one line per evaluation
RUN/report.html              the report (`hfedmoe report RUN`)
RUN/experts.npy              usage, importance, resident, trained per round, client, layer, expert
RUN/checkpoints/round-0003/  model.safetensors, clients.safetensors, state.json; written whole or not at all
RUN/tuned/client-3.safetensors  what a simulated client trained for itself after the last round
RUN/tracking.json            what trackers have got (docs/tracking.md), and tracking.log, tensorboard/, wandb/
RUN/best.json                the best checkpoint, with metric and score
```

    with RunFolder.create(None, config) as run:
        with run.expert_rows(3, num_experts) as add:  # one row per client
            add(0, usage, importance, resident, trained)
        run.append_round({"round": 3, "loss": 1.2})
        run.save_checkpoint(3, tensors, {"rng": ...}, score=0.83)  # last: it completes the round

`RunFolder` is in `runs.folder`. torch and safetensors are imported where they are used. Nothing is pickled.
"""
