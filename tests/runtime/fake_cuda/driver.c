/* A CUDA driver that runs nothing and writes down what it is asked to do, one line a call, into $FAKE_CUDA_LOG.
   $FAKE_CUDA_DEVICES lists devices as capability:SMs:shared memory ("90:132:232448,80:108:166912").
   $FAKE_CUDA_FAIL names a function that fails, as function:code. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fails(const char* name) {
  const char* fail = getenv("FAKE_CUDA_FAIL");
  size_t n = strlen(name);
  return fail && !strncmp(fail, name, n) && fail[n] == ':' ? atoi(fail + n + 1) : 0;
}

static void note(const char* text) {
  FILE* file = fopen(getenv("FAKE_CUDA_LOG"), "a");
  fprintf(file, "%s\n", text);
  fclose(file);
}

static int fact(int device, int field) { /* 0 capability, 1 SMs, 2 shared memory */
  const char* text = getenv("FAKE_CUDA_DEVICES");
  int values[3];
  for (int i = 0; text; ++i) {
    sscanf(text, "%d:%d:%d", &values[0], &values[1], &values[2]);
    if (i == device) return values[field];
    text = strchr(text, ',');
    if (text) ++text;
  }
  return 0;
}

int cuInit(unsigned flags) { return fails("cuInit"); }
int cuDeviceGetCount(int* count) {
  int n = 0;
  while (fact(n, 0)) ++n;
  *count = n;
  return fails("cuDeviceGetCount");
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal + 100;
  return fails("cuDeviceGet");
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  int d = device - 100;
  *value = attribute == 75   ? fact(d, 0) / 10
           : attribute == 76 ? fact(d, 0) % 10
           : attribute == 16 ? fact(d, 1)
           : attribute == 97 ? fact(d, 2)
                             : -1;
  return fails("cuDeviceGetAttribute");
}

static __thread void* stack[16] = {(void*)0xC0};
static __thread int depth;
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)(intptr_t)(0xC0 + device - 100);
  return fails("cuDevicePrimaryCtxRetain");
}
int cuCtxGetCurrent(void** context) {
  *context = stack[depth];
  return fails("cuCtxGetCurrent");
}
int cuCtxPushCurrent_v2(void* context) {
  stack[++depth] = context;
  note("push");
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  *context = stack[depth--];
  note("pop");
  return 0;
}
int cuModuleLoadDataEx(void** module, const char* image, unsigned count, int* options, void** values) {
  char text[200];
  int code = fails("cuModuleLoadDataEx");
  snprintf(text, sizeof(text), "load %.24s context %lx", image + (image[0] == 0x7f), (long)stack[depth]);
  for (char* c = text; *c; ++c) *c = *c == '\n' ? ' ' : *c;
  note(text);
  if (code) strcpy(values[0], "ptxas says no");
  *module = (void*)image;
  return code;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  static char* functions[64];
  static int n;
  functions[n] = strdup(name);
  *function = &functions[n++];
  return fails("cuModuleGetFunction");
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  char text[99];
  snprintf(text, sizeof(text), "attribute %d = %d", attribute, value);
  note(text);
  return fails("cuFuncSetAttribute");
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  static __thread int current;
  int before = current;
  current = *mode;
  *mode = before;
  return 0;
}
typedef struct {
  int id, padding;
  int value[16];
} Attribute;
typedef struct {
  unsigned gx, gy, gz, bx, by, bz, smem;
  void* stream;
  const Attribute* attributes;
  unsigned count;
} Config;
int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
  char text[2000];
  /* $FAKE_CUDA_TYPES says how each argument is read: p and l 64 bits, i 32 bits, f float */
  const char* types = getenv("FAKE_CUDA_TYPES");
  int used = snprintf(text, sizeof(text), "launch %s grid %u %u %u block %u %u %u smem %u stream %lx context %lx",
                      *(char**)function, config->gx, config->gy, config->gz, config->bx, config->by, config->bz,
                      config->smem, (long)config->stream, (long)stack[depth]);
  for (unsigned i = 0; i < config->count; ++i) {
    const Attribute* a = &config->attributes[i];
    used += snprintf(text + used, sizeof(text) - used, " attribute %d = %d", a->id, a->value[0]);
  }
  used += snprintf(text + used, sizeof(text) - used, " args");
  for (int i = 0; types[i]; ++i) {
    used += types[i] == 'f'   ? snprintf(text + used, sizeof(text) - used, " %.9g", *(float*)parameters[i])
            : types[i] == 'i' ? snprintf(text + used, sizeof(text) - used, " %d", *(int32_t*)parameters[i])
                              : snprintf(text + used, sizeof(text) - used, " %ld", *(int64_t*)parameters[i]);
  }
  note(text);
  return fails("cuLaunchKernelEx");
}
int cuGetErrorName(int code, const char** name) {
  *name = code == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_OTHER";
  return 0;
}
int cuGetErrorString(int code, const char** text) {
  *text = "made up";
  return 0;
}
