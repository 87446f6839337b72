# Finds the CUDA toolkit: TV_CUDA_FOUND, TV_CUDA_NVCC, TV_CUDA_INCLUDE_DIR,
# TV_CUDA_VERSION, TV_CUDA_GENCODE (nvcc's options, one per architecture).
#
# The toolkit is a compiler here and nothing more: no library of CUDA is linked
# (kernels/cuda/cuda_load.c), so CMake's CUDA language is not enabled.
set(TV_CUDA AUTO CACHE STRING
  "CUDA kernels: AUTO (when a toolkit is found), ON (required), OFF")
set_property(CACHE TV_CUDA PROPERTY STRINGS AUTO ON OFF)
set(TV_CUDA_ARCHITECTURES "75;80;86;89;90;100;120" CACHE STRING
  "Compute capabilities to compile for; those that nvcc does not know are left out")

set(TV_CUDA_FOUND FALSE)
set(TV_CUDA_GENCODE "")
set(tv_cuda_why "")
if(NOT TV_CUDA STREQUAL "OFF")
  find_program(TV_CUDA_NVCC nvcc
    HINTS ENV CUDACXX ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda
    PATH_SUFFIXES bin)
  if(TV_CUDA_NVCC)
    get_filename_component(tv_cuda_bin "${TV_CUDA_NVCC}" REALPATH)
    get_filename_component(tv_cuda_bin "${tv_cuda_bin}" DIRECTORY)
    find_path(TV_CUDA_INCLUDE_DIR cuda.h
      HINTS "${tv_cuda_bin}/../include" ENV CUDA_PATH ENV CUDA_HOME
      PATHS /usr/local/cuda PATH_SUFFIXES include)
  endif()
  if(NOT TV_CUDA_NVCC OR NOT TV_CUDA_INCLUDE_DIR)
    set(tv_cuda_why "nvcc and cuda.h were not found")
  elseif(NOT DEFINED TV_CUDA_WORKS)
    # A toolkit without a C++ compiler that it accepts is none.
    set(tv_cuda_try "${CMAKE_BINARY_DIR}/CMakeFiles/tv_cuda_try.cu")
    file(WRITE "${tv_cuda_try}"
      "#include <stdint.h>\n__global__ void f(uint32_t *x) { *x = 1; }\n")
    execute_process(
      COMMAND "${TV_CUDA_NVCC}" -std=c++17 -cubin -o /dev/null "${tv_cuda_try}"
      RESULT_VARIABLE tv_cuda_result
      OUTPUT_QUIET ERROR_VARIABLE tv_cuda_error)
    if(tv_cuda_result EQUAL 0)
      set(TV_CUDA_WORKS TRUE CACHE INTERNAL "nvcc compiles a kernel")
    else()
      set(tv_cuda_why "nvcc does not work: ${tv_cuda_error}")
    endif()
  endif()
  if(TV_CUDA_WORKS)
    set(TV_CUDA_FOUND TRUE)
  elseif(TV_CUDA STREQUAL "ON")
    message(FATAL_ERROR "TV_CUDA=ON, but ${tv_cuda_why}")
  else()
    message(STATUS "CUDA kernels are left out: ${tv_cuda_why}")
  endif()
endif()

if(TV_CUDA_FOUND)
  execute_process(COMMAND "${TV_CUDA_NVCC}" --version
    OUTPUT_VARIABLE tv_cuda_text)
  string(REGEX MATCH "release ([0-9]+[.][0-9]+)" unused "${tv_cuda_text}")
  set(TV_CUDA_VERSION "${CMAKE_MATCH_1}")
  execute_process(COMMAND "${TV_CUDA_NVCC}" --list-gpu-code
    OUTPUT_VARIABLE tv_cuda_codes)
  set(tv_cuda_newest "")
  foreach(arch IN LISTS TV_CUDA_ARCHITECTURES)
    if(tv_cuda_codes MATCHES "sm_${arch}[^0-9]")
      list(APPEND TV_CUDA_GENCODE "-gencode=arch=compute_${arch},code=sm_${arch}")
      set(tv_cuda_newest ${arch})
    endif()
  endforeach()
  if(NOT tv_cuda_newest)
    message(FATAL_ERROR "nvcc ${TV_CUDA_VERSION} knows none of "
      "TV_CUDA_ARCHITECTURES (${TV_CUDA_ARCHITECTURES})")
  endif()
  # For GPUs that came later, the driver compiles this.
  list(APPEND TV_CUDA_GENCODE
    "-gencode=arch=compute_${tv_cuda_newest},code=compute_${tv_cuda_newest}")
endif()
