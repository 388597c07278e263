// Which of the instruction sets we build for this CPU and its system can run. Compiled without
// any of them, so that it can be imported anywhere.
#include <Python.h>

#include <initializer_list>

static PyObject* isas(PyObject*, PyObject*) {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    PyObject* found = PyList_New(0);
    for (const char* isa : {vnni ? "avx512_vnni" : "", avx512 ? "avx512" : "", avx2 ? "avx2" : ""}) {
        if (!found || !*isa) continue;
        PyObject* name = PyUnicode_FromString(isa);
        if (!name || PyList_Append(found, name) < 0) Py_CLEAR(found);
        Py_XDECREF(name);
    }
    return found;
}

static PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, "The instruction sets that run here, best first."},
    {nullptr, nullptr, 0, nullptr},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_cpu", "Asks the CPU.", -1, methods, nullptr, nullptr, nullptr, nullptr,
};

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }
