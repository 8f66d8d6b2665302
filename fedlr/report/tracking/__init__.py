"""A run in another tool while it goes on: ``tracking=tensorboard|mlflow|wandb|trackio``.

=============  ==================================================================
module         content
=============  ==================================================================
`tracker`      the interface, and the names of what is sent
`build`        name → tracker; what must be installed
`guard`        a failing or slow tool never ends a run, nor holds it up
`memory`       ``tracking.json``: which of the tool's runs this is, and how far it is
`tensorboard`  event files in the run folder
`mlflow`       MLflow: a SQLite file beside the runs, or a server
`wandb`        Weights & Biases, offline unless asked otherwise
`trackio`      Trackio, on this machine
=============  ==================================================================

Only the server calls it, and only with what ``rounds.jsonl``, ``summary.json`` and
``config.json`` hold, paths and host names left out (`fedlr.report.places`). No tool is imported
before it is used, and none is asked for the name of the machine, its user, the code, the
console or the hardware.
"""
