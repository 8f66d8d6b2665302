"""A record and a summary that the tests of this folder vary with `dataclasses.replace`."""

from __future__ import annotations

from fedlr.report.records import ClientSummary, Refusal, RoundRecord, Summary

RECORD = RoundRecord(
    round=1,
    cohort=("site-0", "site-1", "site-2"),
    accepted=2,
    refused=(Refusal("site-2", "over_budget"),),
    accuracy=0.5,
    loss=0.69,
    epsilon_max=1.25,
    epsilon_by_client={"site-0": 1.25, "site-1": 1.0},
    bytes_down=300,
    bytes_up=200,
    wall_s=2.0,
    server_s=0.25,
    steps=20,
)

SUMMARY = Summary(
    method="fedsvd",
    model="tiny-bert",
    data="demo",
    data_sha256="0" * 64,
    label_names=("no", "yes"),
    majority=0.375,
    rounds=4,
    accuracy_start=0.25,
    accuracy=0.75,
    privacy_mode="dp",
    unit="example",
    accountant="prv",
    epsilon_max=1.25,
    epsilon_budget=6.0,
    delta=1e-5,
    bytes_up=58_432,
    bytes_down=1_500,
    wall_s=125.0,
    server_s=1.5,
    clients=(
        ClientSummary(client="site-0", joins=3, steps=1_234, noise_multiplier=0.8125, epsilon=1.25),
        ClientSummary(client="site-1", joins=1, steps=10, noise_multiplier=0.8125, epsilon=1.0),
    ),
    notices=("The demo data are synthetic.",),
)
