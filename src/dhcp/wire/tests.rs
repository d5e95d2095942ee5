use dhcproto::v4::{self, DhcpOption, MessageType};
use dhcproto::{Encodable, Encoder};
use proptest::prelude::*;

use super::*;

const MAC: Mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

/// A DISCOVER as another implementation writes it, with these options besides.
fn discover(options: impl IntoIterator<Item = DhcpOption>) -> Vec<u8> {
    let mut message = v4::Message::default();
    message.set_xid(0x0102_0304).set_chaddr(&MAC.0).set_flags(v4::Flags::default().set_broadcast());
    message.opts_mut().insert(DhcpOption::MessageType(MessageType::Discover));
    for option in options {
        message.opts_mut().insert(option);
    }
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).unwrap();
    bytes
}

fn read(payload: &[u8]) -> Result<Request, Malformed> {
    Request::try_from(Datagram {
        sender: MAC,
        source: Ipv4Addr::UNSPECIFIED,
        destination: Ipv4Addr::BROADCAST,
        payload,
    })
}

/// A DISCOVER whose options field is these bytes.
fn with_options(field: &[u8]) -> Vec<u8> {
    let mut bytes = discover([]);
    bytes.truncate(FIXED_LEN);
    bytes.extend_from_slice(field);
    bytes
}

#[test]
fn what_another_implementation_writes_is_read() {
    let address = Ipv4Addr::new(172, 20, 100, 7);
    let request = read(&discover([
        DhcpOption::RequestedIpAddress(address),
        DhcpOption::ServerIdentifier(Ipv4Addr::new(172, 20, 100, 1)),
        DhcpOption::MaxMessageSize(1400),
        DhcpOption::ClientIdentifier(vec![7; 300]),
        DhcpOption::Hostname("vm".to_owned()),
    ]))
    .unwrap();
    assert_eq!((request.kind, request.xid, request.chaddr), (Kind::Discover, 0x0102_0304, MAC));
    assert!(request.wants_broadcast() && !request.is_relayed());
    assert_eq!(request.requested, Some(address));
    assert_eq!(request.server_id, Some(Ipv4Addr::new(172, 20, 100, 1)));
    assert_eq!(request.max_message_size, Some(1400));
    assert_eq!(request.client_id, Some(vec![7; 300]), "parts of a long option are joined");
}

#[test]
fn a_hardware_length_of_255_is_refused() {
    for (field, value) in [(2, 255), (2, 0), (2, 16), (1, 6)] {
        let mut bytes = discover([]);
        bytes[field] = value;
        assert_eq!(read(&bytes), Err(Malformed::Hardware), "byte {field} is {value}");
    }
}

#[test]
fn a_hardware_address_that_no_station_has_is_refused() {
    for mac in [[0; 6], [0xff; 6], [0x01, 0, 0x5e, 0, 0, 1]] {
        let mut bytes = discover([]);
        bytes[28..34].copy_from_slice(&mac);
        assert_eq!(read(&bytes), Err(Malformed::NotStation), "{mac:?}");
    }
}

#[test]
fn overloaded_fields_are_read() {
    let mut bytes = with_options(&[52, 1, 3, 255]);
    bytes[108..112].copy_from_slice(&[53, 1, 3, 255]);
    bytes[44..51].copy_from_slice(&[50, 4, 172, 20, 100, 9, 255]);
    let request = read(&bytes).unwrap();
    assert_eq!((request.kind, request.requested), (Kind::Request, Some(Ipv4Addr::new(172, 20, 100, 9))));

    bytes[242] = 4;
    assert_eq!(read(&bytes), Err(Malformed::Overload));
}

#[test]
fn options_that_run_past_their_field_are_refused() {
    assert_eq!(read(&with_options(&[53, 1, 1, 50, 4, 1, 2])), Err(Malformed::Truncated));
    assert_eq!(read(&with_options(&[53, 1, 1, 50])), Err(Malformed::Truncated));
    // In `file`, 128 bytes: an option of 200.
    let mut bytes = with_options(&[53, 1, 1, 52, 1, 1, 255]);
    bytes[108..110].copy_from_slice(&[12, 200]);
    assert_eq!(read(&bytes), Err(Malformed::Truncated));
}

#[test]
fn options_of_a_wrong_length_are_refused() {
    for (option, field) in [
        (53, &[53, 0][..]),
        (53, &[53, 2, 1, 1]),
        (50, &[53, 1, 1, 50, 3, 1, 2, 3]),
        (54, &[53, 1, 1, 54, 5, 1, 2, 3, 4, 5]),
        (57, &[53, 1, 1, 57, 1, 9]),
        (52, &[53, 1, 1, 52, 0]),
    ] {
        assert_eq!(read(&with_options(field)), Err(Malformed::OptionLength(option)), "{field:?}");
    }
}

#[test]
fn what_is_no_clients_message_is_refused() {
    assert_eq!(read(&discover([])[..239]), Err(Malformed::Short));
    assert_eq!(read(&with_options(&[])), Err(Malformed::MessageType));
    for server_message in [0, 2, 5, 6, 9, 255] {
        assert_eq!(read(&with_options(&[53, 1, server_message])), Err(Malformed::MessageType));
    }
    let mut reply = discover([]);
    reply[0] = 2;
    assert_eq!(read(&reply), Err(Malformed::NotRequest));
    let mut bootp = discover([]);
    bootp[236] = 0;
    assert_eq!(read(&bootp), Err(Malformed::Cookie));
}

#[test]
fn a_missing_end_marker_is_forgiven() {
    assert!(read(&with_options(&[53, 1, 1])).is_ok());
    assert!(read(&with_options(&[0, 0, 53, 1, 1, 0])).is_ok());
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
        let _ = read(&bytes);
    }

    /// Random bytes seldom get past the fixed fields; random options do.
    #[test]
    fn no_options_make_it_panic(field in proptest::collection::vec(any::<u8>(), 0..400), overload in 0_u8..=3) {
        let mut options = vec![53, 1, 1];
        if overload > 0 {
            options.extend([52, 1, overload]);
        }
        options.extend(&field);
        let mut bytes = with_options(&options);
        for (at, byte) in field.iter().enumerate().take(192) {
            bytes[44 + at] = *byte;
        }
        let _ = read(&bytes);
    }
}
