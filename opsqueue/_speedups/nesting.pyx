# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""How deep a value's containers are nested. Calls nothing of the value's own."""

from cpython.dict cimport PyDict_Check, PyDict_Next
from cpython.list cimport PyList_Check, PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.set cimport PyAnySet_CheckExact
from cpython.tuple cimport PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE


def nests_deeper(object value, int limit):
    """Whether more than `limit` lists, tuples, dicts and sets (which count twice) are in each other.

    Also True for a container that holds itself. Takes some nanoseconds a value.
    """
    return _deeper(value, limit)


cdef inline bint _holds(PyObject* value) noexcept:
    # most values are none of these, and need no call
    return (
        PyList_Check(<object>value) or PyDict_Check(<object>value) or PyTuple_Check(<object>value)
        or PyAnySet_CheckExact(<object>value)
    )


cdef bint _deeper(object value, int left) except -1:
    cdef Py_ssize_t at
    cdef PyObject* key
    cdef PyObject* item
    if PyList_Check(value):
        if left < 1:
            return True
        for at in range(PyList_GET_SIZE(value)):
            item = PyList_GET_ITEM(value, at)
            if _holds(item) and _deeper(<object>item, left - 1):
                return True
    elif PyTuple_Check(value):
        if left < 1:
            return True
        for at in range(PyTuple_GET_SIZE(value)):
            item = PyTuple_GET_ITEM(value, at)
            if _holds(item) and _deeper(<object>item, left - 1):
                return True
    elif PyDict_Check(value):
        if left < 1:
            return True
        at = 0
        while PyDict_Next(value, &at, &key, &item):
            if _holds(key) and _deeper(<object>key, left - 1):
                return True
            if _holds(item) and _deeper(<object>item, left - 1):
                return True
    elif PyAnySet_CheckExact(value):
        # a tag around an array
        if left < 2:
            return True
        for member in value:
            if _deeper(member, left - 2):
                return True
    return False
