"""What a run or a sweep leaves behind: records, live display, tables, figures, pages.

=============  ============================================================================
module         content
=============  ============================================================================
`records`      `RoundRecord` in ``rounds.jsonl``, `Summary` in ``summary.json``
`spectra`      ``spectra.jsonl``, ``intruders.json``: the geometry of the adapters by round
`lines`        append-only files of one record per line
`strict_json`  the codec of all: frozen dataclasses ↔ strict JSON
`facts`        `RunFacts` in ``run.json``: what a run was made of
`sweep`        the folder of a sweep, and how far each cell is
`live`         `Progress`, the display while a run goes on (standard error)
`sweeping`     the same for the cells of a sweep, and their closing table
`tables`       the closing table of a run
`plots`        ``curves.png``
`page`         ``report.html`` of a run or a sweep, and its figures
`statistics`   means, intervals and paired tests over seeds
`pareto`       what no other setting beats
`tracking`     other tools in which a run can be watched
`plan`         what a run will cost: the records and tables of ``fedlr plan``
`card`         the model card of an exported folder, its loader included
`promise`      the promise of privacy, and what stopped a client, in words
`command`      a configuration as the words of a command line
`places`       settings that name places, and what stands for them where others read
`units`        numbers as people read them: kB, min, %, ε rounded up
=============  ============================================================================

Everything here is public: codes, counts, times measured by the server, metrics
on *public* validation data. Nothing computed from a site's rows may be added.
The records import no third-party package; rich, matplotlib, SciPy and Jinja load when used.
"""
