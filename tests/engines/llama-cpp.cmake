# What the tests need of llama.cpp is its library. What its programs share (arguments, chats, downloads) takes as long to
# compile again, and nothing of it is installed.
set(LLAMA_BUILD_COMMON OFF)
