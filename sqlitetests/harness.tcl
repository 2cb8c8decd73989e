# What the tests of SQLite are told about the place they run in, on ext4 too.
# tester.tcl sources this file where upstream moves the lock bytes to 64 KiB.

if {[info commands system_glob] eq ""} {

  # The lock bytes stay where SQLite's file format has them, at 1 GiB: the agent
  # looks for locks there. What a test wants to happen at the page of these bytes
  # it does not find then, on either side.
  sqlite3_test_control_pending_byte 0x40000000
  rename sqlite3_test_control_pending_byte {}
  proc sqlite3_test_control_pending_byte {offset} { return 1073741824 }

  # Tests save a database by copying test.db*. NAME-pos and its like are part of
  # a database, not copied beside another.
  rename glob system_glob
  proc glob {args} {
    set names [list]
    foreach name [uplevel 1 [list system_glob {*}$args]] {
      if {![regexp {.-(pos|acked|writer)$} $name]} { lappend names $name }
    }
    return $names
  }

  # Tests copy a database while a connection of the same process is in a
  # transaction. The close(2) of that copying drops the process's POSIX locks, as
  # fcntl(2) has it: ext4 does not care, the agent takes what follows for a
  # program without locks. So another process copies.
  rename ::tcl::file::copy system_copy
  proc ::tcl::file::copy {args} {
    if {[llength $args] != 3 || [lindex $args 0] ne "-force"} {
      if {[llength $args] != 2 || [file exists [lindex $args 1]]} { return [system_copy {*}$args] }
    }
    exec cp --remove-destination --preserve=mode,timestamps -- {*}[lrange $args end-1 end]
    return ""
  }

  # NAME-pos and its like go with their database, so that a folder of databases
  # wants rm -f: the second attempt finds what is left.
  rename ::tcl::file::delete system_delete
  proc ::tcl::file::delete {args} {
    if {[catch {system_delete {*}$args}]} { system_delete {*}$args }
    return ""
  }
}
