// The parts of XLA's foreign-function interface that every handler needs.
#ifndef MOEX_XLA
#define MOEX_XLA

#include <stdint.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#define INLINE static inline __attribute__((always_inline))

// Whether XLA only asks for the version that a handler was built for; answers it.
static int is_question(XLA_FFI_CallFrame* frame) {
  // The type of `extension_start` has another name in every version of JAX.
  XLA_FFI_Metadata_Extension* question = (void*)frame->extension_start;
  if (!question || question->extension_base.type != XLA_FFI_Extension_Metadata)
    return 0;
  question->metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  question->metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  question->metadata->traits = 0;
  return 1;
}

INLINE XLA_FFI_Buffer* argument(XLA_FFI_CallFrame* frame, int i) {
  return frame->args.args[i];
}

INLINE void* in(XLA_FFI_CallFrame* frame, int i) { return argument(frame, i)->data; }

INLINE void* out(XLA_FFI_CallFrame* frame, int i) {
  return ((XLA_FFI_Buffer*)frame->rets.rets[i])->data;
}

// The address of a scalar attribute's value; null if there is none of that name.
static const void* attribute_at(XLA_FFI_CallFrame* frame, const char* name) {
  for (int64_t i = 0; i < frame->attrs.size; i++) {
    const XLA_FFI_ByteSpan* span = frame->attrs.names[i];
    if (span->len == strlen(name) && !memcmp(span->ptr, name, span->len))
      return ((XLA_FFI_Scalar*)frame->attrs.attrs[i])->value;
  }
  return 0;
}

// The value of an int32 attribute; 0 if there is none.
INLINE int32_t attribute(XLA_FFI_CallFrame* frame, const char* name) {
  const void* value = attribute_at(frame, name);
  return value ? *(const int32_t*)value : 0;
}

static XLA_FFI_Error* out_of_memory(XLA_FFI_CallFrame* frame, const char* text) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, 0, text,
                                    XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return frame->api->XLA_FFI_Error_Create(&args);
}

#endif
