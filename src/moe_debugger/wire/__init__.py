"""Columnar codec, subjects, ids and format versions: pure numpy and protobuf, no I/O."""
