// Makes the extension an importable, empty module: importing it runs the TORCH_LIBRARY_IMPL blocks of the other files,
// which is all we want from it. FASTDISTIL_MODULE is its name: one build for each instruction set (setup.py).
#include <Python.h>

#define JOIN(a, b) a##b
#define INIT(name) JOIN(PyInit_, name)
#define TEXT(name) #name
#define QUOTE(name) TEXT(name)

extern "C" PyObject* INIT(FASTDISTIL_MODULE)(void) {
  static PyModuleDef module_def = {PyModuleDef_HEAD_INIT, QUOTE(FASTDISTIL_MODULE), nullptr, -1, nullptr};
  return PyModule_Create(&module_def);
}
