"""How good scores are, and whether two sets of scores differ by more than chance.

Modules:
    score_metrics: AUC and LogLoss of the scores of all rows, without binning.
    calibration: predicted probabilities beside the labels, and normalised entropy.
    scores_file: reads what `mlet predict` writes.
    replicates: the metrics of many models under the same drawn rows.
    paired_bootstrap: intervals of the differences of two models on the same rows.
"""
