"""``wsss parity METHOD DIR``: compare the product with numbers of the official code.

The numbers lie in ``*.npz`` files: ``in_*`` arrays go in, ``out_*`` came out of a float32 run and
``out64_*`` of a float64 run, ``cfg`` is a JSON string of settings. Files of other methods carry
plain names and ``config``; there the kind says what goes in, and all else came out. The kind of a
case is the longest known stem that its file name begins with. Whatever the file holds is compared;
an output that the product does not produce fails the case. Where a file lacks what an output needs,
the output is named and not compared; a case of which nothing could be compared fails.

A number may be off by what the method's README allows and by float32 rounding, whichever is more
(``tolerances.py``).

A method's cases are in ``METHOD.py``; its ``KINDS`` is found by that name.
"""

from wsss.core.errors import WSSSError

#: methods whose official code has left numbers
METHODS = ("toco", "clustercam", "getam", "mctformer", "more", "weclip")


def check_method(method: str) -> None:
    """Raise WSSSError unless a method has cases."""
    if method not in METHODS:
        raise WSSSError(f"no parity cases for method '{method}'; known: {', '.join(METHODS)}")
