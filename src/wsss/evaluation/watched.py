"""What validations during training log, and the name of the holdout that may stop a run."""

#: name under which the holdout is evaluated like a split: ``wsss eval splits=[holdout]``
HOLDOUT = "holdout"
#: key in the metrics, logged as ``val/KEY`` -> its heading in the table
LOGGED = {
    "seg_miou": "seg mIoU",
    "seed_miou": "seed mIoU",
    "seed_miou_oracle": "seed oracle",
    "image_map": "image mAP",
    "image_f1": "image F1",
}
#: what early stopping may look at: numbers of the declared holdout of the training data
MONITORED = tuple(f"{HOLDOUT}/{key}" for key in LOGGED)
