// The extension module: every KERNEL of the sources it was linked from, and the threads they use.
#include "module.h"

#include "pool.h"

const module::Entry* module::Entry::first = nullptr;

static void set_threads(int64_t threads) { pool::set_threads(static_cast<int>(threads)); }
KERNEL(set_threads);

static int64_t tasks_done() { return pool::done.load(std::memory_order_relaxed); }
KERNEL(tasks_done);

#define TEXT_(name) #name
#define TEXT(name) TEXT_(name)
#define INIT_(name) PyInit_##name
#define INIT(name) INIT_(name)

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, TEXT(MODULE), "Kernels for one instruction set.", -1, nullptr,
    nullptr, nullptr, nullptr, nullptr,
};

PyMODINIT_FUNC INIT(MODULE)() {
    PyObject* made = PyModule_Create(&definition);
    for (const module::Entry* entry = module::Entry::first; made && entry; entry = entry->next) {
        PyObject* function = PyCFunction_New(const_cast<PyMethodDef*>(&entry->method), nullptr);
        if (!function || PyModule_AddObjectRef(made, entry->method.ml_name, function) < 0)
            Py_CLEAR(made);
        Py_XDECREF(function);
    }
    return made;
}
