"""Quantised models, sharded serving and the serving package.

Modules:
    quantised: the quantised model, and its sharding plan.
    predictor: a request, and the module that answers it.
    package: the scripted model with its tables; `package_files` is copied into it.
"""
