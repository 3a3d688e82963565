#!/usr/bin/perl
# Attacks all endpoints of the system's life, as nobody. As a service, from before enforcer is started at boot until the machine is off:
# listens where the endpoints are, so that what is let through is seen to arrive, tries each in turn, and writes down a line an attempt:
# when it began (microseconds since boot, as systemd tells times), which way, what came of it. With a way's name: one attempt, by
# whoever calls.
use strict;
use warnings;
use IO::Handle;
use POSIX qw(setuid setgid EINTR EISCONN EINPROGRESS EPERM ECONNREFUSED);
use Socket qw(:DEFAULT inet_pton pack_sockaddr_in6 IPPROTO_TCP TCP_NODELAY);
use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC sleep);

# The ways, the last of which leads to no endpoint.
my @ways = (
    ['monit',    '127.0.0.1',        2822],
    ['monit-6',  '::1',              2822],
    ['mapped',   '::ffff:127.0.0.1', 2822],
    ['bus',      '192.0.2.10',       4222],
    ['next-bus', '192.0.2.11',       4222],
    ['other',    '127.0.0.1',        2823],
);
my $nobody = 65534;

sub place {
    my (undef, $address, $port) = @{ $_[0] };
    return (PF_INET6, pack_sockaddr_in6($port, inet_pton(AF_INET6, $address))) if $address =~ /:/;
    return (PF_INET, pack_sockaddr_in($port, inet_aton($address)));
}

# What comes of one attempt: a denial is EPERM (ebpf), a refusal ECONNREFUSED (nftables: somebody does listen).
sub attempt {
    my ($family, $place) = @_;
    socket(my $socket, $family, SOCK_STREAM, 0) or return "socket: $!";
    # Closed by a reset: no port is kept for a minute.
    setsockopt($socket, SOL_SOCKET, SO_LINGER, pack('ii', 1, 0));
    setsockopt($socket, SOL_SOCKET, SO_SNDTIMEO, pack('qq', 5, 0));
    return 'open' if connect($socket, $place);
    return 'denied' if $! == EPERM;
    return 'refused' if $! == ECONNREFUSED;
    # By a signal, as when the system reboots around it: nothing was tried to its end.
    return attempt(@_) if $! == EINTR;
    return "other: $!";
}

if (@ARGV == 1) {
    my ($way) = grep { $_->[0] eq $ARGV[0] } @ways or die "no way is called $ARGV[0]\n";
    print attempt(place($way)), "\n";
    exit;
}

my ($record, $former) = @ARGV;
rename $record, $former;
open my $out, '>', $record or die "$record: $!\n";
for my $way (@ways) {
    next if $way->[0] eq 'mapped';
    my ($family, $place) = place($way);
    socket(my $listener, $family, SOCK_STREAM, 0) or die "socket: $!\n";
    setsockopt($listener, SOL_SOCKET, SO_REUSEADDR, 1);
    bind($listener, $place) or die "bind $way->[1]: $!\n";
    listen($listener, 128) or die "listen: $!\n";
    next if fork;
    while (1) { my $peer; close $peer if accept($peer, $listener) }
}
setgid($nobody);
setuid($nobody);
die "still root\n" if $> == 0 || $< == 0;
my @targets = map { [$_->[0], place($_)] } @ways;
my $told = 0;
while (1) {
    for my $target (@targets) {
        my ($way, @place) = @$target;
        my $began = int(clock_gettime(CLOCK_MONOTONIC) * 1e6);
        print $out "$began $way ", attempt(@place), "\n";
    }
    $out->flush;
    if (!$told++ && $ENV{NOTIFY_SOCKET}) {
        socket(my $manager, PF_UNIX, SOCK_DGRAM, 0) or die "socket: $!\n";
        send($manager, 'READY=1', 0, pack_sockaddr_un($ENV{NOTIFY_SOCKET})) or die "tell systemd: $!\n";
    }
    sleep 0.03;
}
