"""Evaluation: distances between sets of images, their features, and the reports that hold the protocol.

``frechet`` (mathematics, no images), ``features`` (images -> vectors), ``classifier`` (a feature network of one's own),
``sources`` and ``statistics`` (where images and reference statistics come from), ``report`` (what may be compared with
what) and ``fid`` (the command line, ``python -m genssm.metrics.fid --help``).

Motion: ``motion_distances`` (mathematics), ``motion_evaluator`` (the networks), ``motion_evaluator_training`` (one of
one's own), ``motion_clips`` (test clips and sources) and ``motion`` (``python -m genssm.metrics.motion --help``).
"""
