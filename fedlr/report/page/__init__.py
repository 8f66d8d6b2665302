"""A run or a sweep as one self-contained page, and its figures as files.

==================  =============================================================
module              content
==================  =============================================================
`drawing`           one figure in two themes: drawn by matplotlib, kept as SVG
`table`             rows of raw values and how they are read
`frame`             sections → one HTML text that asks the network for nothing
`template`          markup, style and script of that text
`run`               the page of a run
`run_files`         what a run folder holds, as far as it can be read
`run_figures`       its figures by round: accuracy, ε, bytes, time
`geometry_figures`  its figures of where updates point
`sweep`             the page of a sweep, with the modules ``sweep_*``
==================  =============================================================

Everything here is read from a folder's own files, so a page can show nothing that
the records do not hold. jinja2 and matplotlib load when a page is made.
"""
