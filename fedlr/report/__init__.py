"""What a run leaves behind: its records, its live display, its table and its plot.

=============  ==================================================================
module         content
=============  ==================================================================
`records`      `RoundRecord` in ``rounds.jsonl``, `Summary` in ``summary.json``
`strict_json`  the codec of both: frozen dataclasses ↔ strict JSON
`facts`        `RunFacts` in ``run.json``: what a run was made of
`live`         `Progress`, the display while a run goes on (standard error)
`tables`       the closing table
`plots`        ``curves.png``
`plan`         what a run will cost: the records and tables of ``fedlr plan``
`card`         the model card of an exported folder, its loader included
`units`        numbers as people read them: kB, min, %, ε rounded up
=============  ==================================================================

Everything here is public: codes, counts, times measured by the server, metrics
on *public* validation data. Nothing computed from a site's rows may be added.
The records import no third-party package; rich and matplotlib load when used.
"""
