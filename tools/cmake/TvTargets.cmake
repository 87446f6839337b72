# One library target per folder. Each exposes only its own include/ directory,
# so including a header of a folder that is not linked is a compile error: that
# is how design.md's "who may know whom" is enforced.

# Flags for our own code: warnings, the numerics contract, sanitizers.
add_library(tv_dev INTERFACE)
target_compile_definitions(tv_dev INTERFACE _GNU_SOURCE _FILE_OFFSET_BITS=64)
target_compile_options(tv_dev INTERFACE
  -ffp-contract=off
  -Wall -Wextra -Wshadow -Wconversion -Wstrict-prototypes -Wmissing-prototypes
  -Wundef -Wvla -Wpointer-arith -Wwrite-strings)
if(TV_WERROR)
  target_compile_options(tv_dev INTERFACE -Werror)
endif()
if(TV_SANITIZE)
  target_compile_options(tv_dev INTERFACE -fsanitize=${TV_SANITIZE}
    -fno-omit-frame-pointer -fno-sanitize-recover=all)
  target_link_options(tv_dev INTERFACE -fsanitize=${TV_SANITIZE})
endif()

# Coverage for the fuzzer in all of our code; its main comes with the target.
if(TV_FUZZ)
  if(NOT CMAKE_C_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "TV_FUZZ needs clang: libFuzzer comes with it")
  endif()
  target_compile_options(tv_dev INTERFACE -fsanitize=fuzzer-no-link)
  target_link_options(tv_dev INTERFACE -fsanitize=fuzzer-no-link)
endif()

# tv_add_library(NAME SOURCES ... HEADERS ... [PUBLIC targets] [PRIVATE targets])
# The headers live under include/ and are checked to compile on their own (not
# by a CMake before 3.24, which knows no such check).
function(tv_add_library name)
  cmake_parse_arguments(A "" "" "SOURCES;HEADERS;PUBLIC;PRIVATE" ${ARGN})
  add_library(tv_${name} STATIC ${A_SOURCES})
  add_library(tv::${name} ALIAS tv_${name})
  set_target_properties(tv_${name} PROPERTIES EXPORT_NAME ${name})
  if(CMAKE_VERSION VERSION_LESS 3.24)
    target_include_directories(tv_${name} PUBLIC include)
  else()
    target_sources(tv_${name} PUBLIC FILE_SET HEADERS BASE_DIRS include
      FILES ${A_HEADERS})
    set_target_properties(tv_${name} PROPERTIES
      VERIFY_INTERFACE_HEADER_SETS ON)
  endif()
  target_link_libraries(tv_${name} PUBLIC ${A_PUBLIC}
    PRIVATE ${A_PRIVATE} $<BUILD_INTERFACE:tv_dev>)
endfunction()

# What every test sees: where the data is, and sanitizers that report instead
# of dying when a test asks for an impossible amount of memory. Not
# detect_stack_use_after_return: gcc 12 puts 64-byte vectors at wrong addresses
# of its fake stack (GCC bug 110027), and the AVX-512 kernels then fault.
set(TV_TEST_ENVIRONMENT "TV_TEST_DATA=${PROJECT_SOURCE_DIR}/tests/data")
if(TV_SANITIZE)
  list(APPEND TV_TEST_ENVIRONMENT
    "ASAN_OPTIONS=allocator_may_return_null=1:detect_stack_use_after_return=0"
    "TSAN_OPTIONS=allocator_may_return_null=1:second_deadlock_stack=1"
    "UBSAN_OPTIONS=print_stacktrace=1")
endif()

# Seconds that a test may take, in VAR: programs under ThreadSanitizer are ten
# times slower. Scripts know it by TV_TEST_SLOWER.
set(TV_TEST_SLOWER 1)
if(TV_SANITIZE MATCHES "thread")
  set(TV_TEST_SLOWER 6)
endif()
list(APPEND TV_TEST_ENVIRONMENT "TV_TEST_SLOWER=${TV_TEST_SLOWER}")
function(tv_timeout var seconds)
  math(EXPR seconds "${seconds} * ${TV_TEST_SLOWER}")
  set(${var} ${seconds} PARENT_SCOPE)
endfunction()

# tv_test(NAME FOLDER SOURCES ... LIBS ... [LABELS ...] [TIMEOUT n]
#         [ENVIRONMENT VAR=value ...])
# One cmocka program, one CTest entry called FOLDER/NAME, label = folder.
function(tv_test name folder)
  cmake_parse_arguments(A "" "TIMEOUT" "SOURCES;LIBS;LABELS;ENVIRONMENT"
    ${ARGN})
  add_executable(${name} ${A_SOURCES})
  target_link_libraries(${name} PRIVATE ${A_LIBS} tv_test_support tv_dev)
  add_test(NAME ${folder}/${name} COMMAND ${name})
  if(NOT A_TIMEOUT)
    set(A_TIMEOUT 300)
  endif()
  tv_timeout(A_TIMEOUT ${A_TIMEOUT})
  set_tests_properties(${folder}/${name} PROPERTIES
    LABELS "${folder}" TIMEOUT ${A_TIMEOUT}
    ENVIRONMENT "${TV_TEST_ENVIRONMENT};${A_ENVIRONMENT}")
  if(A_LABELS)
    set_property(TEST ${folder}/${name} APPEND PROPERTY LABELS ${A_LABELS})
  endif()
endfunction()

# tv_fuzz(NAME SOURCES ... LIBS ... [CORPUS dir])
# A libFuzzer target called NAME (only with TV_FUZZ, which needs clang), and a
# program that replays its corpus without any fuzzer: CTest entry fuzz/NAME.
# CORPUS defaults to corpus/NAME beside the CMakeLists.txt.
function(tv_fuzz name)
  cmake_parse_arguments(A "" "CORPUS" "SOURCES;LIBS" ${ARGN})
  if(NOT A_CORPUS)
    set(A_CORPUS ${CMAKE_CURRENT_SOURCE_DIR}/corpus/${name})
  endif()
  add_executable(${name}_replay ${A_SOURCES}
    ${PROJECT_SOURCE_DIR}/tests/fuzz/regression_main.c)
  target_link_libraries(${name}_replay PRIVATE ${A_LIBS} tv_dev)
  target_include_directories(${name}_replay PRIVATE
    ${PROJECT_SOURCE_DIR}/tests/fuzz)
  add_test(NAME fuzz/${name} COMMAND ${name}_replay ${A_CORPUS})
  tv_timeout(timeout 300)
  set_tests_properties(fuzz/${name} PROPERTIES LABELS fuzz TIMEOUT ${timeout}
    ENVIRONMENT "${TV_TEST_ENVIRONMENT}")
  if(TV_FUZZ)
    add_executable(${name} ${A_SOURCES})
    target_link_libraries(${name} PRIVATE ${A_LIBS} tv_dev)
    target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests/fuzz)
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  endif()
endfunction()
